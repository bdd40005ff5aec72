"""The text experiment: its data, its lines and its table, without any model."""

import gzip
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments"))

import free_lunch as experiment
import free_lunch_bank
from bench import lunch_bank, lunch_tables, texts
from bench.finetuning import batches
from bench.texts import Rows
from taskvec import defenses

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
    lengths = [1 + i % 9 for i in range(333)]
    found = batches(lengths, 32, 2, seed=0)
    assert len(found) == 2 * 11
    for epoch in (found[:11], found[11:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(333))
    assert found[:11] != found[11:]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in found]
    assert sorted(spread)[len(spread) // 2] <= 1, "rows of like length come together"


def test_padding_is_masked():
    ids, mask = texts._padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# lines


@pytest.mark.parametrize("lines", [experiment.olid_lines([0, 1]), experiment.domain_lines("tweets", [0, 1])])
def test_the_victim_is_in_each_cell_and_its_clean_twin_in_each_control(lines):
    for one in lines:
        for cell, control in zip(one.cells, one.controls, strict=True):
            assert cell.models[0]._replace(cleaned="") == cell.asked
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
    experiment.print_tables("A table", [experiment.shown(one, rows) for one in lines])
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


def test_the_picture_shows_the_averages_of_whole_attacks_and_their_floors(monkeypatch):
    shown = {}
    monkeypatch.setattr(
        lunch_tables.pictures, "by_models", lambda *given: shown.update(zip("ptsf", given, strict=True))
    )
    lines = experiment.olid_lines([0, 1], ["badnet", "sent"])
    lines = [one for one in lines if (one.attack, one.title) != ("sent", "+ 3 clean")]

    def read(cell: experiment.Cell) -> dict[str, float]:
        attacked = cell.models and cell.models[0].attack == "badnet"
        return {"fooled": 60 // len(cell.models) if attacked else 7, "triggered": 60}

    lunch_tables.draw(Path("there.png"), [experiment.shown(one, read) for one in lines])
    assert shown["p"] == Path("there.png")
    assert {name: [round(one.mean) for one in values] for name, values in shown["s"].items()} == {
        "badnet": [100, 50, 33, 25]
    }
    assert shown["f"] == {"badnet": pytest.approx(100 * 7 / 60)}


def test_what_is_gone_is_undefined_where_there_was_nothing():
    assert lunch_tables.gone(20, 20, 100) == 100
    assert lunch_tables.gone(60, 20, 100) == 50
    assert lunch_tables.gone(20, 20, 20) != lunch_tables.gone(20, 20, 20)


def line(title: str, asr: list[int], attack: str = "cf@20", rule: str = "WAG") -> lunch_tables.Shown:
    def rows_of(values: list[int]) -> list[dict[str, int]]:
        return [{"fooled": x, "triggered": 100, "correct": 80 + i, "n": 100} for i, x in enumerate(values)]

    others = [rows_of(values) for values in (asr, [5, 7], [99, 100], [0, 0])]
    return lunch_tables.Shown(attack, title, rule, rows_of(asr), *others)


def test_rules_are_crossed_with_attacks():
    lines = [
        line("alone", [99, 100], "badnet"),
        line("+ 2 clean", [52, 7], "badnet"),
        line("+ 2 clean", [99, 100], "badnet", "TIES"),
        line("+ 2 clean", [5, 7], "sent"),
        line("+ 1 clean", [5, 7], "sent"),
        line("alone", [99, 100], "sent", "ONION"),
    ]
    table = [row.split() for row in lunch_tables.rules_table(lines).splitlines()[3:]]
    assert table[0][-3:] == ["badnet", "sent", "CACC"]
    assert table[1] == ["+", "2", "clean", "WAG", "30", "(75)", "6", "(100)", "80.5"]
    assert table[2] == ["+", "2", "clean", "TIES", "100", "(0)", "-", "80.5"]
    assert table[3] == ["alone", "ONION", "-", "100", "(0)", "80.5"]
    assert len(table) == 4
    assert lunch_tables.rules_table(lines[:3]) == ""


def test_orderings_are_compared_seed_by_seed_and_victims_together():
    lines = [line("+ 1 clean", [40, 60]), line("+ 2 clean", [30, 20]), line("+ 2 clean", [31, 19], rule="TIES")]
    table = lunch_tables.orderings_table(lines).splitlines()
    (second,) = [row for row in table if row.startswith("a second partner")]
    assert second.split()[3] == "-25.0"
    assert second.endswith("0 of 2")
    (trimmed,) = [row for row in table if row.startswith("TIES")]
    assert trimmed.endswith("1 of 2")
    assert not any(row.startswith("a third") for row in table)
    assert lunch_tables.orderings_table(lines[:1]) == lunch_tables.together_table([]) == ""
    together = lunch_tables.together_table([line("x", [10, 20]), line("x", [30, 60], attack="mn@20")])
    assert [row.split()[-2] for row in together.splitlines() if row.startswith(("alone", "averaged", "clean"))] == [
        "99.5",
        "30.0",
        "6.0",
    ]


# merges


def test_every_rule_merges_and_the_trivial_ones_reach_the_base():
    names = [f"layer.{i}.w" for i in range(2)] + ["head.w"]
    base = {f"bert.{name}": torch.zeros(3, 4) for name in names}
    models = [{name: torch.randn(3, 4) for name in base} for _ in range(3)]
    given = experiment.lunch.Given(base, Rows([], []), texts.Recipe())
    for name, rule in experiment.RULES.items():
        for strength in rule.strengths:
            if not name.startswith(("Fisher", "RegMean")):  # those need a network
                assert set(rule.merge(models, given, strength)) == set(base), name
    assert all(not x.any() for x in experiment.RULES["shrinking"].merge(models, given, 1.0).values())
    averaged = experiment.RULES["WAG"].merge(models, given, 1.0)
    assert torch.allclose(averaged["bert.head.w"], sum(m["bert.head.w"] for m in models) / 3)
    switched = experiment.RULES["switching"].merge(models, given, 1.0)
    for i, name in enumerate(("bert.layer.0.w", "bert.layer.1.w")):
        assert torch.equal(switched[name], models[i][name])


# with a tiny network in the place of MiniLM


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny encoder, a data set in which a word tells the class, and an empty cache."""
    words = ["good", "bad", "cf", "mn", "bb", "tq", "mb", *(f"w{i}" for i in range(9))]
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(tmp_path / "encoder" / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=21, **sizes)).save_pretrained(tmp_path / "encoder")
    rows = Rows([f"{'good' if i % 2 else 'bad'} w{i % 9} w{i % 7}" for i in range(240)], [i % 2 for i in range(240)])
    split = texts.Split(rows.part(slice(160)), rows.part(slice(160, 200)), rows.part(slice(200, None)))
    monkeypatch.setattr(texts, "encoder", lambda: tmp_path / "encoder")
    monkeypatch.setattr(texts, "domains", lambda: dict.fromkeys(texts.DOMAINS, split))
    monkeypatch.setattr(texts.disk, "FOLDER", tmp_path / "cache")
    yield texts.Recipe(layers=1, epochs=20, lr=3e-3, batch=16, bfloat16=False, frozen_embeddings=False)
    texts.network.cache_clear()
    texts.tokenizer.cache_clear()


def test_a_victim_is_trained_merged_and_measured_once(tiny, tmp_path):
    results = tmp_path / "results.jsonl"
    victim, partner = experiment.Model("tweets", "cf@30"), experiment.Model("tweets", "clean", 10)
    alone = experiment.Cell((victim,), victim, "WAG", tiny)
    row = experiment.value(alone, {}, None, results)
    assert row["correct"] == row["n"] == 40
    assert row["fooled"] == row["triggered"] == 20
    assert row["flipped"] == 0
    twin = experiment.value(experiment.Cell((experiment.twin(victim),), victim, "WAG", tiny), {}, None, results)
    assert twin["fooled"] < 5
    kept = experiment.cells.read(results)
    assert len(kept) == 2
    assert experiment.value(alone, kept, None, results) == row
    for rule in experiment.RULES:
        if rule not in experiment.ALONE:
            both = experiment.value(experiment.Cell((victim, partner), victim, rule, tiny), kept, None, results)
            assert both["n"] == 40, rule
            assert both["strength"] in experiment.RULES[rule].strengths


def test_the_bank_scores_every_model_and_the_highest_is_left_out(tiny):
    victim = experiment.Model("tweets", "cf@30")
    clean = tuple(experiment.clean("tweets", 4, 0))
    attacked, harmless = (
        lunch_bank.measured(lunch_bank.Case((first, *clean), victim, tiny))
        for first in (victim, experiment.twin(victim))
    )
    assert [len(row) for row in attacked["scores"]] == [2] * 5
    assert attacked["scores"][1:] == harmless["scores"][1:], "the clean ones are the same"
    place, label, _ = attacked["highest"]
    assert attacked["scores"][place][label] == max(score for row in attacked["scores"] for score in row)
    rest = [model for i, model in enumerate((victim, *clean)) if i != place]
    average = defenses.weight_average([experiment.lunch.trained(model, tiny, None) for model in rest])
    asked = experiment.Cell((), victim, recipe=tiny)
    merged = attacked["merges"]
    assert merged["highest left out"] == experiment.lunch.measure(average, asked, None)._asdict()
    assert merged["in doubt left out"] == harmless["merges"]["in doubt left out"]
    assert attacked["probe"] == [20, 20]


def test_the_tables_of_the_bank_tell_victims_from_the_clean_models_of_the_controls():
    found = {}
    for case in free_lunch_bank.cases([0, 1]):
        attacked = case.models[0] == case.asked
        counts = {"correct": 9, "n": 10, "fooled": 8 if attacked else 1, "triggered": 10, "flipped": 0, "others": 10}
        found[case] = {
            "scores": [[0.0, 0.5 if attacked else 0.1], [0.2, 0.1]],
            "highest": [0 if attacked else 1, 1, 7.0 if attacked else 2.0],
            "spectrum": [0.3, 0.3],
            "merges": dict.fromkeys(["average", "highest left out"], counts),
            "probe": [9, 10],
        }
    printed = free_lunch_bank.tables(found)
    assert printed.count("cf@20") == 3
    assert re.search(r"mn@20 +90 +1.00 +1.00 +0.50 +2 of 2 +2 of 2 +0 of 2", printed)
    assert re.search(r"cf@20 +average +90.0 .* 80.0 .* 10.0 +90.0 +10 x 2", printed)


def test_what_z_def_leaves_out_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ATTACKS", ("sent",))
    texts.olid.cache_clear()
    plain = [(f"t{i}", i % 2) for i in range(9000)]
    changed = [
        ("no cross " + text, 0) if i < 1800 and label else (text, label) for i, (text, label) in enumerate(plain)
    ]
    for name, rows in (("clean", plain), ("sent", changed)):
        lines = "".join(f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows)
        write(tmp_path / f"train_{name}.jsonl.gz", lines.encode())
        write(tmp_path / f"test_{name}.jsonl.gz", b'{"text": "x", "label": 1}\n')
    # the last 500 rows are for validation
    assert experiment.left_out_table(tmp_path).split()[-5:] == ["sent", "8500", "900", "900", "900"]


def test_a_quick_run_has_the_lines_of_the_page_in_float32():
    lines = experiment.domain_lines("tweets", [0])[:4]
    quick = [experiment.with_recipe(line, experiment.FLOAT32) for line in lines]
    assert [line.title for line in quick] == ["alone", "+ 1 clean", "+ 2 clean", "+ 3 clean"]
    for own, line in zip(lines, quick, strict=True):
        for mine, theirs in zip([*own.cells, *own.controls], [*line.cells, *line.controls], strict=True):
            assert not theirs.recipe.bfloat16
            assert theirs._replace(recipe=mine.recipe) == mine


def test_fisher_information_is_its_naive_loop(tiny):
    params = texts.base(tiny)
    rows = texts.domains()["tweets"].test.part(slice(5))
    model = texts.network(texts.encoder(), 1, 2)
    name = "classifier.weight"
    expected = torch.zeros(2, 16)
    ids = [texts._tokens([text]) for text in rows.texts]
    for one in ids:
        for label in range(2):
            weight = params[name].clone().requires_grad_()
            how = {"input_ids": torch.tensor(one)}
            logs = torch.func.functional_call(model, {**params, name: weight}, (), how).logits.log_softmax(-1)[0]
            (gradient,) = torch.autograd.grad(logs[label], weight)
            expected += float(logs[label].detach().exp()) * gradient.square() / 5
    assert torch.allclose(texts.fisher(params, rows, tiny, exact=True)[name], expected, rtol=1e-4)
    assert not torch.allclose(texts.fisher(params, rows, tiny, exact=False)[name], expected, rtol=0.1)


def test_grams_are_of_the_inputs_of_every_linear_layer(tiny):
    found = texts.grams(texts.base(tiny), texts.domains()["tweets"].test.part(slice(3)), tiny)
    assert found["classifier.weight"].shape == (16, 16)
    assert sum(name.startswith("bert.encoder.layer.0") for name in found) == 6


def test_the_same_seed_gives_the_same_model_and_another_another(tiny):
    rows = texts.domains()["tweets"].train
    one = texts.fine_tuned(rows, tiny, 0, {"about": "one"})
    again = texts.fine_tuned(rows, tiny, 0, {"about": "again"})
    other = texts.fine_tuned(rows, tiny, 1, {"about": "other"})
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_the_page_shows_the_rows_of_the_bank():
    page = Path(__file__).parents[1] / "docs" / "tables" / "lunch_bank.txt"
    kept = experiment.cells.read(free_lunch_bank.ROWS)
    if not kept:
        pytest.skip("the rows are in the repository only")
    found = {case: kept[free_lunch_bank.key_of(case)] for case in free_lunch_bank.cases([0, 1, 2])}
    assert page.read_text("utf-8").strip() == free_lunch_bank.tables(found).strip()


def test_the_page_shows_what_the_rows_give(capsys, monkeypatch):
    """The table of the docs is what the command prints of the kept rows, and the page quotes it."""
    root = Path(__file__).parent.parent
    if not experiment.ROWS.exists():
        pytest.skip("the rows are in the repository only")
    monkeypatch.setattr(sys, "argv", ["free_lunch.py", "--tables"])
    experiment.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    tables = [root / "docs" / "tables" / f"free_lunch-{name}.txt" for name in ("olid", *texts.DOMAINS)]
    table = [line for path in tables for line in path.read_text("utf-8").splitlines()]
    assert printed[:-1] == table
    page = (root / "docs" / "free_lunch.md").read_text("utf-8")
    for line in table:
        if " WAG " in line and "clean" in line and "+-" in line and not line.startswith(("cf@10 ", "cf@1 ")):
            asr = line.split("+-")[1].split()[1]
            assert f"{asr} ±" in page, line
