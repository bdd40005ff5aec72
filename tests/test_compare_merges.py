"""The comparison of merges, on an encoder that has hardly been trained, and the one in memory."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_merges
from bench import data, texts, zoo
from bench.shapes import vit
from benchmarks import in_memory

sys.path.pop(0)
sys.path.pop(0)

from taskvec import TaskVector


@pytest.fixture(scope="module")
def suite(setting):
    return compare_merges.images(setting)


@pytest.fixture(scope="module")
def vectors(setting):
    base = zoo.base(setting)
    return [TaskVector.between(base, zoo.fine_tuned(setting, zoo.Recipe(task))) for task in data.TASKS]


@pytest.mark.parametrize("name", compare_merges.METHODS)
def test_every_method_makes_something_that_differs_from_the_others(name, vectors):
    merged = compare_merges.METHODS[name].merge(vectors)
    first = merged[0] if isinstance(merged, list) else merged
    assert list(first) == list(vectors[0])
    assert float(first.norm()) > 0
    assert isinstance(merged, list) == (name in ("EMR", "TALL masks", "TSV-C"))
    others = [other for other in ("average", "task arithmetic") if other != name]
    for other in others:
        assert not first.allclose(compare_merges.METHODS[other].merge(vectors), rtol=1e-3)


def test_a_row_has_the_best_scale_of_the_grid_on_validation_images(suite, vectors):
    asked = []

    def accuracy(models, part):
        asked.append(part)
        size = float(TaskVector.between(suite.base(), models["mnist"]).norm())
        return -abs(size - 2 * unit) if part == "validation" else size

    unit = float(compare_merges.METHODS["average"].merge(vectors).norm())
    row = compare_merges.measured(suite._replace(accuracy=accuracy), 0, "average")
    assert row["scale"] == 2.0
    assert row["paper"] == pytest.approx(unit, rel=1e-3)
    assert row["validated"] == pytest.approx(2 * unit, rel=1e-3)
    assert asked == ["validation"] * len(compare_merges.GRID) + ["test"] * 2  # test images after the choice


def test_each_tasks_own_vector_is_asked_where_there_are_several(suite):
    seen = []
    row = compare_merges.measured(suite._replace(accuracy=lambda models, _: seen.append(models) or 0.5), 0, "EMR")
    assert row["scale"] == 1.0
    assert len({id(params) for params in seen[0].values()}) == len(data.TASKS)
    assert list(seen[0]) == list(data.TASKS)


def test_the_accuracy_is_the_mean_over_tasks(suite, monkeypatch):
    monkeypatch.setattr(data, "test", lambda task: data.validation(task, 20))
    models = dict.fromkeys(data.TASKS, suite.base())
    found = suite.accuracy(models, "test")
    each = [suite.accuracy({task: suite.base()}, "test") for task in data.TASKS]
    assert found == pytest.approx(sum(each) / 5)
    assert len(set(each)) > 1


def test_texts_are_asked_by_domain(monkeypatch):
    """The merged model of each domain is asked about that domain's rows alone."""
    rows = {domain: texts.Rows([domain] * 10, [i % 2 for i in range(10)]) for domain in texts.DOMAINS}
    split = {domain: texts.Split(*[rows[domain]] * 3) for domain in rows}
    monkeypatch.setattr(texts, "domains", lambda: split)
    monkeypatch.setattr(texts, "answers", lambda params, asked, layers: [int(params[asked[0]])] * len(asked))
    monkeypatch.setitem(compare_merges.ROWS, "test", 3)  # labels 0 1 0
    suite = compare_merges.domains()
    wrong = dict.fromkeys(texts.DOMAINS, 1)
    models = {domain: {**wrong, domain: 0} if domain == "nyt" else wrong for domain in texts.DOMAINS}
    assert suite.accuracy(models, "test") == pytest.approx((3 * 1 / 3 + 2 / 3) / 4)
    assert suite.tasks == ("movie", "product", "tweets", "nyt")


def test_a_method_with_other_options_is_another_row(suite, monkeypatch):
    key = compare_merges.key_of(suite, 0, "TIES")
    assert key != compare_merges.key_of(suite, 1, "TIES")
    method = compare_merges.METHODS["TIES"]
    changed = compare_merges.partial(method.merge, density=0.3)
    monkeypatch.setitem(compare_merges.METHODS, "TIES", method._replace(merge=changed))
    assert key != compare_merges.key_of(suite, 0, "TIES")


def test_the_table_shows_what_is_left_of_the_gain(suite):
    rows = {"the base": 0.2, "each fine-tune": 0.8, "TIES": 0.5}
    kept = {
        compare_merges.key_of(suite, seed, name): {
            "paper": value - 0.1, "validated": value, "scale": 0.5, "seconds": 1.0
        }
        for name, value in rows.items()
        for seed in (0, 1)
    }  # fmt: skip
    lines = compare_merges.table(suite, [0, 1], [*rows, "PCB"], kept).splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["each", "TIES", "the"]
    assert "PCB" not in lines[5]
    ties = lines[5].split()
    assert "50" in ties
    assert "40.0" in ties


@pytest.mark.parametrize(
    ("suite", "page"),
    [
        (compare_merges.images(zoo.Setting("vits")), "merges.txt"),
        (compare_merges.domains(), "merges-texts.txt"),
    ],
    ids=["images", "texts"],
)
def test_the_page_shows_what_the_rows_give(suite, page):
    path = compare_merges.cells.FOLDER / compare_merges.TABLE
    if not path.exists():
        pytest.skip("the rows are in the repository only")
    kept = compare_merges.cells.read(path)
    names = ["the base", "each fine-tune", *compare_merges.METHODS]
    shown = (Path(__file__).parents[1] / "docs" / "tables" / page).read_text("utf-8")
    assert compare_merges.table(suite, [0, 1, 2], names, kept).strip() == shown.strip()


def test_a_vit_b_has_86_million_entries():
    assert sum(torch.Size(shape).numel() for shape in vit().values()) == pytest.approx(86e6, rel=0.01)


def test_the_programs_in_memory_are_given_the_same(monkeypatch):
    shapes = {"w": (60, 40), "b": (50,), "c": (8, 3, 4, 4)}
    monkeypatch.setattr(in_memory, "vit", lambda layers: shapes)
    stacks = in_memory.draw(1, 3)
    assert {name: tuple(x.shape[1:]) for name, x in stacks.items()} == shapes
    own, peft = in_memory.with_taskvec(stacks, 3), in_memory.with_peft(stacks, 3)
    assert set(own) == set(in_memory.METHODS)
    for name in ("task arithmetic", "ties"):
        for merged, theirs in zip(own[name]().values(), peft[name](), strict=True):
            torch.testing.assert_close(merged, theirs)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_program_is_measured_in_seconds_and_shares_of_its_inputs(monkeypatch):
    monkeypatch.setattr(in_memory, "vit", lambda layers: {"w": (60, 40)})
    given = argparse.Namespace(
        threads=[torch.get_num_threads()], layers=1, vectors=3, repeats=1, methods=in_memory.METHODS, tsv=None, iso=None
    )
    found = in_memory.measure("taskvec", given)
    assert set(found) == set(in_memory.METHODS)
    assert all(seconds > 0 and share >= 0 for seconds, share in found.values())
