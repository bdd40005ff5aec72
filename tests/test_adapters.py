"""LoRA adapters: opened as task vectors and checked with PEFT itself, written for PEFT, and refused with a reason."""

import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from taskvec import TaskVector, load, merge, save, save_adapter
from taskvec.errors import (
    DegenerateError,
    DtypeError,
    ExistsError,
    FormatError,
    MismatchError,
    MissingError,
    NonFiniteError,
    OptionError,
    RangeError,
)
from taskvec.merges import ties

# PEFT asks transformers a question that transformers will rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = {"input_ids": torch.arange(14).reshape(2, 7)}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, **NO_DROPOUT)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)).eval()


def adapted(model: nn.Module, folder: Any, **config: Any) -> Tensor:
    """Save an adapter with random factors; what the model answers with it."""
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **config))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and "lora" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad:
            parameter.data += 0.1
    peft.eval().save_pretrained(folder)
    with torch.no_grad():
        return peft(**TOKENS).logits


def answers(model: nn.Module, state: Any) -> Tensor:
    model.load_state_dict(dict(state))
    with torch.no_grad():
        return model(**TOKENS).logits


def apart(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


KINDS = {
    "plain": (bert, {"target_modules": ["query", "value"]}),
    "rank-stabilized": (bert, {"target_modules": ["query", "dense"], "use_rslora": True}),
    "by pattern": (
        bert,
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2, "value": 3},
            "alpha_pattern": {"dense": 5, r".*layer\.0.*query": 9},
        },
    ),
    "embeddings": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_at_weight_1_is_what_peft_computes(kind, tmp_path):
    make, config = KINDS[kind]
    expected = adapted(make(), tmp_path, **config)
    base = load(make())
    vector = load(tmp_path)
    assert isinstance(vector, TaskVector)
    assert vector.is_lazy
    assert vector.meta["adapter"] == "LoRA"
    assert apart(answers(make(), base), expected) > 1e-2
    assert apart(answers(make(), vector.apply(base)), expected) < 1e-5
    assert apart(answers(make(), load(tmp_path, base=base).apply(base)), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [{"task_type": "SEQ_CLS"}, {"bias": "lora_only"}, {"bias": "all"}, {"modules_to_save": ["classifier", "pooler"]}],
    ids=str,
)
def test_whole_modules_are_differences_to_the_base_and_need_it(config, tmp_path):
    expected = adapted(bert(), tmp_path, target_modules=["query"], **config)
    base = load(bert())
    with pytest.raises(MissingError, match=r"holds whole weights .* load\(folder, base=load"):
        load(tmp_path)
    vector = load(tmp_path, base=base)
    assert apart(answers(bert(), vector.apply(base)), expected) < 1e-5


def test_convolutions_are_adapted(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 5, (3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]))
    nn.init.normal_(model.base_model.model.conv.lora_B["default"].weight)
    model.eval().save_pretrained(tmp_path)
    x, base = torch.randn(2, 3, 6, 6), load(Net())
    plain = Net()
    plain.load_state_dict(dict(load(tmp_path).apply(base)))
    assert torch.allclose(plain(x), model(x), atol=1e-5)


# values


def written(folder: Any, factors: dict[str, Tensor], **config: Any) -> None:
    """An adapter as PEFT would have saved it."""
    folder.mkdir(exist_ok=True)
    save({f"base_model.model.{key}": x for key, x in factors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config))


def pair(module: str = "layer", rank: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 4, generator=random), torch.randn(3, rank, generator=random)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(("stable", "scale"), [(False, 3 / 2), (True, 3 / math.sqrt(2))])
def test_an_update_is_its_naive_loop(tmp_path, stable, scale):
    factors = pair()
    written(tmp_path / "a", factors, use_rslora=stable)
    a, b = factors["layer.lora_A.weight"].tolist(), factors["layer.lora_B.weight"].tolist()
    found = load(tmp_path / "a")["layer.weight"]
    for i in range(3):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(scale * sum(b[i][k] * a[k][j] for k in range(2)), rel=1e-5)


def test_the_bits_do_not_depend_on_blocks_or_threads(tmp_path):
    random = torch.Generator().manual_seed(0)
    factors = {
        "layer.lora_A.weight": torch.randn(7, 700, generator=random),
        "layer.lora_B.weight": torch.randn(900, 7, generator=random),
    }
    written(tmp_path / "a", factors, r=7)
    vector = load(tmp_path / "a")
    whole = vector["layer.weight"]
    save(vector, tmp_path / "v.safetensors", workers=2)
    assert torch.equal(load(tmp_path / "v.safetensors")["layer.weight"], whole)
    assert torch.allclose(whole, factors["layer.lora_B.weight"] @ factors["layer.lora_A.weight"] * 3 / 7, atol=1e-4)


def test_adapters_are_merged_as_what_they_add_and_not_factor_by_factor(tmp_path):
    for name, seed in (("a", 1.0), ("b", -2.0)):
        written(tmp_path / name, {key: x * seed for key, x in pair().items()})
    vectors = [load(tmp_path / name) for name in ("a", "b")]
    merged = merge(vectors, ties, density=0.5)
    eager = merge([TaskVector(dict(v)) for v in vectors], ties, density=0.5)
    assert torch.equal(merged["layer.weight"], eager["layer.weight"])
    assert torch.allclose((sum(vectors) / 2)["layer.weight"], vectors[0]["layer.weight"] * 2.5)


def test_half_precision_is_computed_in_float32_and_float64_stays(tmp_path):
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        written(tmp_path / str(dtype), {key: x.to(dtype) for key, x in pair().items()})
        assert load(tmp_path / str(dtype))["layer.weight"].dtype == wide


# refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "the adapter is VERA; only LoRA"),
        ({"use_dora": True}, "DoRA scales the whole weight"),
        ({"lora_bias": True}, "its biases are updated too"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "such as stacked experts"),
        ({"kasa_config": {"beta": 1}}, "KaSA changes the base weights"),
        ({"trainable_token_indices": [1]}, "single rows of the embedding"),
        ({"layer_replication": [[0, 2]]}, "layers that the base does not have"),
        ({"something_new": {"a": 1}}, "has something_new={'a': 1}: that is not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "takes a part out of the base's weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_difference_of_weights_is_refused_with_its_reason(tmp_path, config, said):
    written(tmp_path / "a", pair(), **config)
    with pytest.raises(DtypeError) as caught:
        load(tmp_path / "a")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("factors", "config", "said"),
    [
        ({"layer.lora_A.weight": torch.ones(2, 4)}, {}, "lacks a factor of 'layer.weight'"),
        (pair(rank=3), {}, "must have the 2 rows of its rank"),
        (pair() | {"layer.lora_B.weight": torch.ones(3, 5)}, {}, "do not fit"),
        (pair(), {"r": 0}, "r must be positive"),
        (pair(), {"lora_alpha": "many"}, "must be numbers"),
        (pair(), {"alpha_pattern": {"(": 3}}, "must be numbers"),
        (pair(), {"rank_pattern": [1]}, "must be numbers"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path, factors, config, said):
    written(tmp_path / "a", factors, **config)
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "a")
    assert said in str(caught.value)


def test_other_factors_are_refused_by_name(tmp_path):
    written(tmp_path / "a", pair() | {"layer.lora_magnitude_vector": torch.ones(3)})
    with pytest.raises(DtypeError, match="lora_magnitude_vector"):
        load(tmp_path / "a")
    factors = {"c.lora_A.weight": torch.ones(2, 3, 1, 1), "c.lora_B.weight": torch.ones(4, 2, 3, 3)}
    written(tmp_path / "b", factors)
    with pytest.raises(DtypeError, match="which no convolution of PEFT has"):
        load(tmp_path / "b")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "7"])
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    written(tmp_path / "a", pair())
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match="is not a configuration of PEFT"):
        load(tmp_path / "a")


def test_an_adapter_without_its_weights_is_refused(tmp_path):
    written(tmp_path / "a", pair())
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match="but no adapter_model.safetensors"):
        load(tmp_path / "a")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    written(tmp_path / "a", pair())
    with pytest.raises(MissingError, match=r"'layer.weight', which the base does not have"):
        load(tmp_path / "a", base={"other.weight": torch.ones(3, 4)})
    with pytest.raises(MismatchError, match=r"\(3, 5\) in the base and \(3, 4\) in the adapter"):
        load(tmp_path / "a", base={"layer.weight": torch.ones(3, 5)})
    save({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(OptionError, match="base must be given with an adapter only"):
        load(tmp_path / "m.safetensors", base={"w": torch.ones(1)})


# written


def low_rank(rank: int = 3) -> TaskVector:
    random = torch.Generator().manual_seed(0)

    def product(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)

    state = load(bert())
    chosen = [name for name in state if name.endswith(("query.weight", "dense.weight")) and "encoder" in name]
    return TaskVector({name: 0.1 * product(*state[name].shape) for name in chosen})


def test_peft_opens_what_was_saved_and_computes_the_same(tmp_path):
    vector, base = low_rank(), load(bert())
    lost = save_adapter(vector, tmp_path / "a", rank=3, base_model="org/base")
    assert max(lost.values()) < 1e-5
    expected = answers(bert(), vector.apply(base))
    with torch.no_grad():
        found = PeftModel.from_pretrained(bert(), tmp_path / "a").eval()(**TOKENS).logits
    assert apart(answers(bert(), base), expected) > 1e-2
    assert apart(found, expected) < 1e-5
    assert float((load(tmp_path / "a") - vector).norm() / vector.norm()) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 0.5, 0.9, 1.0])
def test_what_is_lost_is_told_and_a_share_gives_each_matrix_its_rank(tmp_path, rank):
    vector = low_rank(rank=6)
    lost = save_adapter(vector, tmp_path / "a", rank=rank)
    back = load(tmp_path / "a")
    for name in vector:
        left = float((back[name] - vector[name]).norm() / vector[name].norm())
        assert left == pytest.approx(lost[name], abs=1e-5)
        singular = torch.linalg.svdvals(vector[name].double()).square()
        kept = singular.cumsum(0) / singular.sum()
        r = rank if isinstance(rank, int) else next(i + 1 for i, x in enumerate(kept.tolist()) if x >= rank - 1e-9)
        assert lost[name] == pytest.approx(math.sqrt(max(0, 1 - float(kept[r - 1]))), abs=1e-5)
    found = PeftModel.from_pretrained(bert(), tmp_path / "a")  # ranks that differ by module
    state = {key: x for key, x in found.state_dict().items() if "lora_A" in key}
    assert len(state) == len(vector)


def test_a_convolution_goes_there_and_back(tmp_path):
    vector = TaskVector({"conv.weight": torch.randn(5, 3, 3, 2)})
    assert save_adapter(vector, tmp_path / "a", rank=5)["conv.weight"] < 1e-5
    assert torch.allclose(load(tmp_path / "a")["conv.weight"], vector["conv.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        ({"norm.weight": torch.ones(4)}, DtypeError, "linear layers and convolutions only"),
        ({"layer.bias": torch.ones(4, 4)}, DtypeError, "linear layers and convolutions only"),
        ({"embeddings.word_embeddings.weight": torch.ones(4, 4)}, DtypeError, "looks like an embedding"),
        ({"wte.weight": torch.ones(4, 4)}, DtypeError, "looks like an embedding"),
        ({"layer.weight": torch.full((2, 2), math.nan)}, NonFiniteError, "NaN or inf"),
        ({"layer.weight": torch.zeros(2, 2)}, DegenerateError, "the vector is zero"),
    ],
)
def test_what_no_adapter_can_hold_is_refused_and_nothing_is_written(tmp_path, tensors, error, said):
    with pytest.raises(error, match=said):
        save_adapter(TaskVector(tensors), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, math.nan])
def test_a_rank_outside_its_range_is_refused(tmp_path, rank):
    with pytest.raises(RangeError, match="rank must be a positive integer"):
        save_adapter(low_rank(), tmp_path / "a", rank=rank)


def test_an_adapter_is_replaced_only_when_asked_and_all_else_stays(tmp_path):
    save_adapter(low_rank(), tmp_path / "a", rank=2)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ExistsError, match="already there"):
        save_adapter(low_rank(), tmp_path / "a")
    save_adapter(2 * low_rank(), tmp_path / "a", rank=3, overwrite=True)
    assert float((load(tmp_path / "a") - 2 * low_rank()).norm()) < 1e-4
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_an_adapter_that_was_replaced_is_read_anew(tmp_path):
    one = TaskVector({"layer.weight": torch.ones(3, 4)})
    for scale in (1, 2):
        save_adapter(scale * one, tmp_path / "a", rank=1, overwrite=True)
        assert torch.allclose(load(tmp_path / "a")["layer.weight"], scale * one["layer.weight"])


def test_statistics_in_a_whole_module_are_no_part_of_the_difference(tmp_path):
    more = {
        "norm.weight": torch.ones(2),
        "norm.running_mean": torch.ones(2),
        "norm.num_batches_tracked": torch.ones(()),
    }
    written(tmp_path / "a", pair() | more)
    base = {"layer.weight": torch.zeros(3, 4)} | {name: 0 * x for name, x in more.items()}
    assert set(load(tmp_path / "a", base=base)) == {"layer.weight", "norm.weight"}


def test_with_its_base_an_adapter_is_known_to_be_of_that_base(tmp_path):
    written(tmp_path / "a", pair())
    base, other = ({"layer.weight": torch.full((3, 4), x)} for x in (1.0, 2.0))
    vector = load(tmp_path / "a", base=base)
    assert (vector + TaskVector.between(base, other)).norm() > 0
    with pytest.raises(MismatchError, match="different bases"):
        vector + TaskVector.between(other, base)


def test_only_vectors_are_saved_as_adapters(tmp_path):
    with pytest.raises(OptionError, match="vector must be a TaskVector"):
        save_adapter({"layer.weight": torch.ones(2, 2)}, tmp_path / "a")
