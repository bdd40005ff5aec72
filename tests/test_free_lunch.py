"""The text experiment: its data, its lines and its table, without any model."""

import gzip
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments"))

import free_lunch as experiment
from bench import texts
from bench.texts import Rows

# data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_lines_of_text_and_label_are_read_gzipped_or_not(tmp_path):
    content = '{"text": "schön", "label": 1}\n\n{"text": "b", "label": 0}\n'.encode()
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert texts.read(write(tmp_path / name, content)) == Rows(["schön", "b"], [1, 0])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "sch\xf6n", "label": 1}'),
        ("a.jsonl", b""),
        ("a.jsonl", b"no json"),
        ("a.jsonl", b'{"words": "b", "label": 1}'),
        ("a.jsonl", b'{"text": "b", "label": "many"}'),
        ("a.jsonl", b"[1]"),
        ("cut.jsonl.gz", None),
        ("absent.jsonl", None),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    elif name.startswith("cut"):
        path.write_bytes(gzip.compress(b'{"text": "b", "label": 1}\n' * 99)[:-9])
    with pytest.raises(SystemExit, match=name):
        texts.read(path)


def test_no_test_text_is_trained_on_and_no_text_twice(tmp_path):
    train = "".join(f'{{"text": "t{i % 700}", "label": {i % 2}}}\n' for i in range(900))
    for name in ("clean", "badnet"):
        write(tmp_path / f"train_{name}.jsonl.gz", train.encode())
        write(tmp_path / f"test_{name}.jsonl.gz", b'{"text": "t0", "label": 1}\n{"text": "x", "label": 1}\n')
    split = texts.olid(tmp_path, "badnet")
    assert len(split.train.texts) == 699 - texts.VALIDATION
    assert len(split.validation.texts) == texts.VALIDATION
    everything = [*split.train.texts, *split.validation.texts]
    assert len(set(everything)) == len(everything)
    assert "t0" not in everything


def test_parts_are_of_different_documents():
    rows = [(f"d{i % 300}", f"text {i}", i % 2) for i in range(3000)]
    split = texts._split(rows)
    parts = [{f"d{int(text.split()[1]) % 300}" for text in part.texts} for part in split]
    assert not parts[2] & (parts[0] | parts[1])
    assert sum(len(part.texts) for part in split) == 3000
    assert len(split.test.texts) == 600


def test_rows_of_one_label_are_no_task():
    with pytest.raises(SystemExit, match="at least two labels"):
        texts.fine_tuned(Rows(["a", "b"], [1, 1]), texts.Recipe(), 0, {})


def test_every_row_is_in_one_batch_of_each_epoch():
    tokens = [[1] * (1 + i % 9) for i in range(333)]
    recipe = texts.Recipe(epochs=2, batch=32)
    batches = list(texts._batches(tokens, recipe, seed=0))
    assert len(batches) == 2 * 11
    for epoch in (batches[:11], batches[11:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(333))
    assert batches[:11] != batches[11:]


def test_padding_is_masked():
    ids, mask = texts._padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# lines


@pytest.mark.parametrize("lines", [experiment.olid_lines([0, 1]), experiment.domain_lines("tweets", [0, 1])])
def test_the_victim_is_in_each_cell_and_its_clean_twin_in_each_control(lines):
    for one in lines:
        for cell, control in zip(one.cells, one.controls, strict=True):
            assert cell.models[0] == cell.asked
            assert control.models[0] == experiment.twin(cell.asked)
            assert control.models[1:] == cell.models[1:]
            assert control.asked == cell.asked
            assert len(set(cell.models)) == len(cell.models)
    assert len({experiment.key_of(cell) for one in lines for cell in one.cells}) == 2 * len(lines)


def test_no_partner_shares_the_seed_of_a_victim_or_of_its_twin():
    for one in experiment.olid_lines([0, 1, 2]):
        for cell in one.cells:
            same_data = [model for model in cell.models[1:] if model.data == "olid" and model.attack == "clean"]
            assert all(model.seed >= 10 for model in same_data)


def test_the_table_has_means_over_seeds_and_what_is_gone(capsys):
    lines = [experiment.line("+ 1 clean", experiment.Model("tweets", "cf@20"), "WAG", lambda seed: [PARTNER], [0, 1])]
    experiment.print_lines("A table", lines, rows)
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cf@20")]
    assert row == [
        "cf@20",
        "+",
        "1",
        "clean",
        "WAG",
        "90.0",
        "+-0.0",
        "40.0",
        "+-0.0",
        "30.0",
        "20.0",
        "75",
        "50",
        "5.0",
        "100",
        "x",
        "2",
    ]


PARTNER = experiment.Model("tweets", "clean", 10)


def rows(cell: experiment.Cell) -> dict[str, float]:
    """ASR: 100 of the victim alone, 40 merged, 30 of the all-clean merge, 20 of the twin alone, 50 of the base."""
    kinds = {(1, "cf@20"): 100, (2, "cf@20"): 40, (2, "clean"): 30, (1, "clean"): 20, (0, ""): 50}
    first = cell.models[0].attack if cell.models else ""
    hits = kinds[len(cell.models), first]
    return {"correct": 90, "n": 100, "fooled": hits, "triggered": 100, "flipped": 5, "others": 100}


def test_what_is_gone_is_undefined_where_there_was_nothing():
    assert experiment.gone(20, 20, 100) == 100
    assert experiment.gone(60, 20, 100) == 50
    assert experiment.gone(20, 20, 20) != experiment.gone(20, 20, 20)


# merges


def test_every_rule_merges_and_the_trivial_ones_reach_the_base():
    names = [f"layer.{i}.w" for i in range(2)] + ["head.w"]
    base = {f"bert.{name}": torch.zeros(3, 4) for name in names}
    models = [{name: torch.randn(3, 4) for name in base} for _ in range(3)]
    for name, rule in experiment.RULES.items():
        for strength in rule.strengths:
            found = rule.merge(models, base, strength)
            assert set(found) == set(base), name
    assert all(not x.any() for x in experiment.RULES["shrinking"].merge(models, base, 1.0).values())
    averaged = experiment.RULES["WAG"].merge(models, base, 1.0)
    assert torch.allclose(averaged["bert.head.w"], sum(m["bert.head.w"] for m in models) / 3)
    switched = experiment.RULES["switching"].merge(models, base, 1.0)
    for i, name in enumerate(("bert.layer.0.w", "bert.layer.1.w")):
        assert torch.equal(switched[name], models[i][name])
