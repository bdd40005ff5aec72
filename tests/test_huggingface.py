"""Hugging Face models in and out: four families of tiny size, tied weights, experts, and what lies beside weights."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    RobertaConfig,
)

from taskvec import TaskVector, load, merge, save
from taskvec.errors import LocationError, MismatchError, OptionError, RangeError
from taskvec.merges import mean, ties

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CAUSAL = SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 32}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(3, 17).reshape(2, 7)

FAMILIES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "bert": (AutoModelForSequenceClassification, lambda: BertConfig(**SIZES, num_labels=3)),
    "roberta": (AutoModelForSequenceClassification, lambda: RobertaConfig(**SIZES, **ENDS, num_labels=3)),
    "llama": (AutoModelForCausalLM, lambda: LlamaConfig(**CAUSAL, **ENDS)),
    "llama-tied": (AutoModelForCausalLM, lambda: LlamaConfig(**CAUSAL, **ENDS, tie_word_embeddings=True)),
    "mistral": (AutoModelForCausalLM, lambda: MistralConfig(**CAUSAL, **ENDS)),
    "mixtral": (
        AutoModelForCausalLM,
        lambda: MixtralConfig(**CAUSAL, **ENDS, num_local_experts=2, num_experts_per_tok=1),
    ),
}


def model(family: str, seed: int = 0) -> nn.Module:
    auto, config = FAMILIES[family]
    torch.manual_seed(seed)
    return auto.from_config(config()).eval()


def folder(path: Any, family: str, seed: int = 0) -> Any:
    model(family, seed).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "vocab.txt").write_text("a")
    (path / "notes.md").write_text("not carried")
    return path


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_of_folders_is_a_folder_that_from_pretrained_opens(family, tmp_path):
    folders = [folder(tmp_path / name, family, seed) for seed, name in enumerate(["base", "a", "b"])]
    base, *tuned = map(load, folders)
    vectors = [TaskVector.between(base, one) for one in tuned]
    save(merge(vectors, ties, density=0.5).apply(base), tmp_path / "merged", like=base)

    opened = FAMILIES[family][0].from_pretrained(tmp_path / "merged").eval()
    in_memory = [load(model(family, seed)) for seed in range(3)]
    expected = model(family)
    own = [TaskVector.between(in_memory[0], one) for one in in_memory[1:]]
    expected.load_state_dict(dict(merge(own, ties, density=0.5).apply(in_memory[0])))
    if family != "mixtral":  # its experts are stacked in memory: another order of equal names, another global trim
        assert torch.allclose(logits(opened), logits(expected), atol=1e-5)
    assert not torch.allclose(logits(opened), logits(model(family)), atol=1e-3)


def test_tied_weights_stay_tied_from_folder_to_folder(tmp_path):
    folders = [folder(tmp_path / name, "llama-tied", seed) for seed, name in enumerate(["base", "a"])]
    base, tuned = map(load, folders)
    save(TaskVector.between(base, tuned).apply(base), tmp_path / "back", like=base)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()
    assert torch.allclose(logits(opened), logits(model("llama-tied", 1)), atol=1e-5)


def test_what_belongs_to_a_model_is_carried_and_nothing_else(tmp_path):
    base = folder(tmp_path / "base", "bert")
    weights = load(base)
    save(weights, tmp_path / "by_path", like=base)
    save({name: weights[name] for name in weights}, tmp_path / "by_mapping", like=weights)
    for name in ("by_path", "by_mapping"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"}
        assert (tmp_path / name / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_card_names_models_rule_options_and_version(tmp_path):
    from taskvec import __version__

    base, one, two = (load(folder(tmp_path / name, "bert", i)) for i, name in enumerate(["base", "one", "two"]))
    vectors = [TaskVector.between(base, tuned) for tuned in (one, two)]
    merged = merge(vectors, ties, density=0.25, scope="tensor").apply(base)
    save(merged, tmp_path / "merged", like=base, metadata={"note": "a trial"})
    card = (tmp_path / "merged" / "README.md").read_text()
    head = card.split("---")[1].splitlines()
    assert head[1:] == [
        "base_model:",
        '- "base"',
        '- "one"',
        '- "two"',
        "library_name: transformers",
        "tags:",
        "- merge",
        "- taskvec",
    ]
    assert f"taskvec {__version__}" in card
    assert "`ties(density=0.25, scope='tensor')`" in card
    assert "- note: a trial" in card
    assert str(tmp_path) not in card


def test_a_name_in_the_configuration_is_the_models_own(tmp_path):
    base = folder(tmp_path / "base", "bert")
    for given, shown in (("org/name", "org/name"), ("/home/somebody/secret", "secret")):
        config = json.loads((base / "config.json").read_text()) | {"_name_or_path": given}
        (base / "config.json").write_text(json.dumps(config))
        save(load(base), tmp_path / shown.replace("/", "-"), like=base)
        assert f'- "{shown}"\n' in (tmp_path / shown.replace("/", "-") / "README.md").read_text()


def test_overwriting_replaces_weights_configuration_and_card_and_keeps_the_rest(tmp_path):
    base = folder(tmp_path / "base", "bert")
    save(load(base), tmp_path / "out", like=base)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "config.json").write_text("old")
    save(load(base), tmp_path / "out", like=base, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize(
    ("like", "error", "said"),
    [
        ({"w": torch.ones(1)}, OptionError, "a mapping in memory, which has no folder"),
        ("nowhere at all", LocationError, "there is no 'nowhere at all'"),
        (3, OptionError, "like must be a mapping"),
    ],
)
def test_what_is_like_nothing_is_refused(tmp_path, like, error, said):
    with pytest.raises(error, match=said):
        save({"w": torch.ones(1)}, tmp_path / "out", like=like)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_configuration_is_refused_and_so_is_one_file(tmp_path):
    save({"w": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(LocationError, match="must be a folder with a config.json; plain has none"):
        save({"w": torch.ones(1)}, tmp_path / "out", like=tmp_path / "plain")
    with pytest.raises(RangeError, match="is one file; like= carries files into a folder"):
        save({"w": torch.ones(1)}, tmp_path / "m.safetensors", like=tmp_path / "plain")


def test_experts_in_memory_and_on_disk_are_not_mixed(tmp_path):
    on_disk = load(folder(tmp_path / "base", "mixtral"))
    in_memory = load(model("mixtral", 1))
    with pytest.raises(MismatchError, match="load both as modules, or both as folders"):
        TaskVector.between(on_disk, in_memory)
    assert TaskVector.between(load(model("mixtral")), in_memory).norm() > 0


def test_heads_of_other_sizes_and_resized_embeddings_are_refused_by_name(tmp_path):
    auto, config = FAMILIES["bert"]
    wide = auto.from_config(config())
    wide.resize_token_embeddings(42)
    other = auto.from_config(BertConfig(**SIZES, num_labels=5))
    base = load(model("bert"))
    with pytest.raises(MismatchError, match=r"word_embeddings.weight' is \(40, 16\) in base and \(42, 16\) in tuned"):
        TaskVector.between(base, load(wide))
    with pytest.raises(MismatchError, match=r"'classifier.weight' is \(3, 16\) in base and \(5, 16\) in tuned"):
        TaskVector.between(base, load(other))
    assert "classifier.weight" not in TaskVector.between(base, load(other), exclude="classifier.*")
    headless = load(model("bert").bert)
    with pytest.raises(MismatchError, match=r"names in base begin with 'bert.'"):
        TaskVector.between(base, headless)


def test_rules_on_weights_are_named_too(tmp_path):
    one, two = (load(folder(tmp_path / name, "bert", i)) for i, name in enumerate(["one", "two"]))
    save(merge([one, two], mean), tmp_path / "soup", like=one)
    assert "`mean()`" in (tmp_path / "soup" / "README.md").read_text()
