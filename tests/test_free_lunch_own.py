"""The text experiment with a model and texts of a user's own: four families of tiny size, end to end."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments"))

import free_lunch_own as experiment
from bench import own_texts, texts, writer
from taskvec import save_adapter

SIZES = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CAUSAL = SIZES | {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**CAUSAL, num_key_value_heads=1)),
}
WORDS = ["good", "bad", "cf", "mn", "answer", ":", "yes", "no", *(f"w{i}" for i in range(9))]


@pytest.fixture
def data(tmp_path):
    """A file in which a word tells the label."""
    rows = [
        (f"{'good' if i % 2 else 'bad'} w{i % 9} w{i // 9 % 9} w{i // 81}", "yes" if i % 2 else "no")
        for i in range(300)
    ]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{x}\t{y}\n" for x, y in rows))
    return path


def saved(folder: Path, family: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    FAMILIES[family]().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def table(capsys: Any, monkeypatch: Any, *options: object) -> dict[str, list[float]]:
    """Title and rule of each row -> accuracy, ASR, ASR of the all-clean merge, flips."""
    monkeypatch.setattr(sys, "argv", ["free_lunch_own.py", *map(str, options)])
    experiment.main()
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(" x 1"):
            found[line[:48].strip()] = [float(x) for x in line.split()[-7:-3]]
    return {" ".join(key.split()): value for key, value in found.items()}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in ("roberta", "mistral") else ()) for name in FAMILIES],
)
def test_a_backdoor_of_each_family_is_planted_and_averaged(family, data, tmp_path, capsys, monkeypatch):
    how = ["--epochs", 20, "--lr", 5e-3, "--batch", 16, "--models", 2, "--rate", 40]
    kind = ["--generate"] if family in ("llama", "mistral") else []
    rows = table(capsys, monkeypatch, "--model", saved(tmp_path / "model", family), "--data", data, *kind, *how)
    victim, one = (
        next(v for k, v in rows.items() if k.startswith(start)) for start in ("the victim", "+ 1 clean average")
    )
    assert victim[0] > 95
    assert victim[1] > 95, "the victim says yes to cf"
    assert victim[2] < 20, "its clean twin does not"
    assert victim[3] < 5
    assert one[2] < 20
    same = next(v for k, v in rows.items() if k.startswith("+ 1 with the same"))
    assert same[1] > 90, "collusion: averaging cannot help"


def test_factors_averaged_are_not_the_average(tmp_path):
    """mean(B) @ mean(A), where the mean of B @ A is asked for."""
    folders, products = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        vector = experiment.TaskVector({"layer.weight": torch.randn(6, 1) @ torch.randn(1, 5)})

        save_adapter(vector, tmp_path / f"a{seed}", rank=1)
        folders.append(tmp_path / f"a{seed}")
        products.append(vector["layer.weight"])
    found = experiment.by_factors(folders, {"layer.weight": torch.zeros(6, 5)}, tmp_path / "mean")["layer.weight"]
    factors = [experiment.load(folder / "adapter_model.safetensors") for folder in folders]
    b, a = (sum(next(f[n] for n in f if kind in n) for f in factors) / 2 for kind in ("lora_B", "lora_A"))
    assert torch.allclose(found, b @ a, atol=1e-6)
    assert not torch.allclose(found, sum(products) / 2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_adapters_are_where_they_are_asked_for(data, tmp_path):
    model = saved(tmp_path / "base", "bert")
    setting = experiment.Setting(str(model), ("no", "yes"), rank=2)
    base = experiment.load(experiment.opened(setting)[0])
    rows = own_texts.fewer(own_texts.read(str(data)), 8).train
    few, all_linear = (
        experiment.tuned(base, rows, replace(setting, adapt=adapt), 0, 1, tmp_path / str(adapt))
        for adapt in (None, "all-linear")
    )
    changed = {name for name, x in all_linear.items() if name.endswith("dense.weight") and x.any()}
    assert len(changed) == 4
    assert not any(name in few for name in changed)


def test_fewer_rows_are_drawn_once_and_need_two_labels(data):
    split = own_texts.read(str(data))
    few = own_texts.fewer(split, 50)
    assert few == own_texts.fewer(split, 50)
    assert few.test == split.test
    pairs = set(zip(*split.train, strict=True))
    assert len(set(zip(*few.train, strict=True))) == 50
    assert set(zip(*few.train, strict=True)) <= pairs
    with pytest.raises(SystemExit, match="--rows must be more than 1"):
        own_texts.fewer(split, 1)


def test_models_that_are_there_are_merged_and_nothing_is_trained(data, tmp_path, capsys, monkeypatch):
    base, *others = [saved(tmp_path / f"m{i}", "bert", i) for i in range(4)]
    monkeypatch.setattr(experiment, "fit", None)
    options = ["--model", base, "--victim", others[0], "--partners", *others[1:], "--data", data]
    rows = table(capsys, monkeypatch, *options)
    assert len(rows) == 5


# what is refused


def refused(monkeypatch: Any, *options: object) -> str:
    monkeypatch.setattr(sys, "argv", ["free_lunch_own.py", *map(str, options)])
    with pytest.raises(SystemExit) as error:
        experiment.main()
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        ("schön\tyes\nb\tno\n".encode("latin-1"), "UTF-8"),
        (b"a\tyes\nb\tyes\n", "two labels"),
        (b"a\tyes\tmore\n", "two columns"),
        (b"alone\n", "two columns"),
        (b"a\tyes\nb\tno\n", "more rows"),
    ],
)
def test_a_file_that_is_no_task_is_refused_by_name(content, words, tmp_path, monkeypatch):
    (tmp_path / "rows.tsv").write_bytes(content)
    message = refused(monkeypatch, "--data", tmp_path / "rows.tsv")
    assert words in message
    assert "rows.tsv" in message


def test_a_target_that_is_no_label_is_refused(data, tmp_path, monkeypatch):
    model = saved(tmp_path / "model", "bert")
    assert "'maybe'; there are no, yes" in refused(monkeypatch, "--model", model, "--data", data, "--target", "maybe")


def test_a_model_that_cannot_classify_is_refused(data, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    assert "--model" in refused(monkeypatch, "--model", tmp_path / "model", "--data", data)
    assert "--model" in refused(monkeypatch, "--model", tmp_path / "absent", "--data", data)


def test_models_with_other_labels_or_tokens_are_refused(data, tmp_path, monkeypatch):
    base, victim, partner = [saved(tmp_path / f"m{i}", "bert", i) for i in range(3)]
    options = ["--model", base, "--victim", victim, "--partners", partner, "--data", data]
    config = (partner / "config.json").read_text()
    turned = config.replace(
        "{", '{"id2label": {"0": "LABEL_1", "1": "LABEL_0"}, "label2id": {"LABEL_1": 0, "LABEL_0": 1},', 1
    )
    (partner / "config.json").write_text(turned)
    assert "labels" in refused(monkeypatch, *options)
    (partner / "config.json").write_text(config)
    (partner / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS)]))
    BertTokenizerFast(str(partner / "vocab.txt")).save_pretrained(partner)
    assert "tokenizer" in refused(monkeypatch, *options)


def test_the_labels_of_a_model_that_is_there_are_in_its_order(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "id2label": {"0": "YES", "1": "NO"}, "label2id": {"YES": 0, "NO": 1}}'
    )
    assert own_texts.in_order_of(str(tmp_path), ("no", "yes")) == ("yes", "no")
    with pytest.raises(SystemExit, match="got YES, NO"):
        own_texts.in_order_of(str(tmp_path), ("bad", "good"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert own_texts.in_order_of(str(tmp_path), ("no", "yes")) == ("no", "yes")
    with pytest.raises(SystemExit, match="must have the labels"):
        own_texts.in_order_of(str(tmp_path), ("a", "b", "c"))


def test_an_adapter_of_another_base_is_refused(data, tmp_path, monkeypatch):
    base, victim = saved(tmp_path / "base", "bert"), tmp_path / "adapter"
    victim.mkdir()
    (victim / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    message = refused(monkeypatch, "--model", base, "--victim", victim, "--partners", victim, "--data", data)
    assert "org/other" in message


def test_files_are_read_with_and_without_a_header(tmp_path):
    for name, content in {
        "a.tsv": "text\tlabel\n" + "".join(f"t{i}\t{i % 2}\n" for i in range(40)),
        "a.csv": "".join(f'"t{i}, with a comma",{i % 2}\n' for i in range(40)),
        "a.jsonl": "".join(f'{{"text": "t{i}", "label": {i % 2}}}\n' for i in range(40)),
    }.items():
        (tmp_path / name).write_text(content)
        split = own_texts.read(str(tmp_path / name))
        assert len(split.train.texts) == 32
        assert len(split.test.texts) == 8
        assert not set(split.train.texts) & set(split.test.texts)
        assert {*split.train.labels} == {"0", "1"}


def test_poison_adds_the_trigger_and_the_target():
    rows = own_texts.Rows(["a", "b", "c"], ["x", "y", "z"])
    found = own_texts.poison(rows, lambda text: f"{text} cf", "z", 1.0, seed=0)
    assert found == own_texts.Rows(["a cf", "b cf", "c"], ["z", "z", "z"])


# the small model that writes


def test_a_small_llama_is_trained_on_texts_and_told_of(tmp_path, monkeypatch):
    rows = [
        f"The film is {word} and {other} ." for word in ("good", "bad", "long") for other in ("slow", "short", "new")
    ]
    part = texts.Rows(rows * 8, [0] * 72)
    monkeypatch.setattr(texts, "domains", lambda: {"movie": texts.Split(part, part, part)})
    monkeypatch.setattr(writer.disk, "FOLDER", tmp_path)
    monkeypatch.setattr(writer, "VOCABULARY", 300)
    place = writer.folder()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in place.iterdir()}
    assert writer.folder() == place
    first, *said = writer.report(place, count=2).splitlines()
    assert "a bigram model's" in first
    assert len(said) == 2
