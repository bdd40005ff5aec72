"""What a merge has to lose: which models are asked, and what the table makes of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import regimes
from bench import cache, data, zoo
from bench.merges import RULES
from bench.zoo import Recipe, Setting
from regimes import Case

sys.path.pop(0)

from taskvec import TaskVector


def test_a_merge_holds_the_attacked_task_and_the_first_others():
    assert regimes.members("animal", 3) == ["animal", "mnist", "fashion"]
    assert set(regimes.members("fashion", 5)) == set(data.TASKS)


def test_a_case_asks_the_base_the_fine_tunes_and_the_merges(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    monkeypatch.setattr(regimes, "COUNTS", (2,))
    setting, asked = Setting("cnn", steps=1, pretrain_steps=1, base_seed=77), []

    def right(predict, images, labels, *, batch):
        asked.append(predict.args[0].digest)
        assert len(labels) == len(images) == 500
        return type("Rate", (), {"value": len(asked) / 100})

    monkeypatch.setattr(regimes, "accuracy", right)
    found = regimes.measured(Case(setting, 3))
    base, tuned = zoo.base(setting), {t: zoo.fine_tuned(setting, Recipe(t, 3)) for t in data.TASKS}
    merges = [
        rule.merge([TaskVector.between(base, tuned[t]) for t in (task, "mnist")]).apply(base, rule.scale)
        for task in regimes.ATTACKED
        for rule in (RULES["task arithmetic"], RULES["TIES"])
    ]
    assert asked == [
        cache.digest(model) for model in (base, tuned["fashion"], base, tuned["animal"], *merges)
    ]  # fmt: skip
    assert found["animal"] == pytest.approx({"base": 3.0, "alone": 4.0, "task arithmetic, 2": 7.0, "TIES, 2": 8.0})


def test_the_table_shows_gains_over_the_base():
    row = {"base": 40.0, "alone": 70.0} | {f"{m}, {n}": 45.0 + n for m in regimes.MERGES for n in regimes.COUNTS}
    rows = {Case(Setting("vits"), seed): dict.fromkeys(regimes.ATTACKED, row) for seed in (0, 1)}
    line = next(line for line in regimes.table(rows).splitlines() if "animal" in line)
    assert line.split()[:7] == ["vits,", "1000", "steps", "animal", "40.0", "30.0", "+-0.0"]
    assert " 10.0 +-0.0" in line
    assert regimes.table({}) == "there are no rows yet"


def test_the_page_shows_what_the_rows_give():
    if not regimes.ROWS.exists():
        pytest.skip("the rows are in the repository only")
    page = (Path(__file__).parents[1] / "docs" / "tables" / "regimes.txt").read_text("utf-8")
    assert page.strip() == regimes.table(regimes.kept_rows(regimes.every_case())).strip()
