"""The second edition of the study: what a world draws, and what its tables make of fronts."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import primary
from bench import data, second, second_tables, significance
from bench.merges import RULES
from bench.second import Attack, Job, World
from bench.second_defenders import DEFENCES, Scene, defence_of, merged

sys.path.pop(0)

from taskvec import BackdoorVector, TaskVector


def test_a_defender_has_no_row_of_the_contributors(world):
    parts = [
        second.rows_of(w, "fashion", rows).images.flatten(1)
        for w in (world, World(8))
        for rows in ("contributor", "few")
    ]
    mine, few, theirs, other_few = ({tuple(image.tolist()) for image in part} for part in parts)
    assert not mine & few
    assert len(few) == pytest.approx(100, abs=2)
    assert mine != theirs
    assert few != other_few


def test_models_differ_in_what_their_jobs_differ_in(world):
    job = Job(world, "mnist", "few", steps=3)
    models = {
        "clean": second.model(job),
        "another draw": second.model(job._replace(draw=1)),
        "contributor": second.model(job._replace(rows="contributor")),
        "attacked": second.model(job._replace(attack=Attack("random", 3))),
        "by SGD": second.model(job._replace(attack=Attack("random", 3, optimizer="sgd"))),
        "own head": second.model(job._replace(attack=Attack("random", 3), own_head=True)),
        "directions": second.model(job._replace(attack=Attack("random", 3, normalised=True))),
        "lighter": second.model(job._replace(attack=Attack("random", 3, weight=1.0))),
    }
    for (one, a), (other, b) in combinations(models.items(), 2):
        assert float(TaskVector.between(a, b).norm()) > 0, (one, other)
    assert job._replace(attack=Attack()).twin() == job


def test_triggers_are_where_the_attack_says(world):
    images = torch.zeros(2, 1, 28, 28)
    stamped = second.trigger_of(Job(world, "mnist", attack=Attack("random", 3, "top-left")))(images)
    assert float(stamped[:, :, :3, :3].sum()) > 0
    assert float(stamped[:, :, 3:].sum()) == 0
    for kind in ("blended", "warped"):
        changed = second.trigger_of(Job(world, "mnist", attack=Attack(kind)))(images + 0.5 * torch.rand(2, 1, 28, 28))
        assert changed.shape == images.shape


def test_a_bank_has_a_probe_of_every_class_that_is_no_attack_of_the_tables(world):
    bank = second.bank(world, "fashion")
    assert list(bank) == list(range(10))
    for job in bank.values():
        assert job.rows == "few"
        assert job.seed != Job(world, "fashion").seed
        for attack in primary.ATTACKS.values():
            assert (job.attack.size, job.attack.place) != (attack.size, attack.place)


# tables


def front(*points: tuple[float, float]):
    return list(points)


def test_the_asr_at_a_gain_lies_between_two_strengths():
    line = front((1.0, 0.8), (0.95, 0.4), (0.85, 0.2), (0.0, 0.05))
    assert second_tables.at_gain(line, 0.9) == pytest.approx(0.3)
    assert second_tables.at_gain(line, 1.0) == pytest.approx(0.8)
    assert second_tables.at_gain(line, 1.1) is None
    assert second_tables.at_gain(front((0.7, 0.9), (0.95, 0.6), (0.1, 0.0)), 0.9) == pytest.approx(
        0.6 - 0.6 * 0.05 / 0.85
    )


def point(validation: float, own: float, asr: float):
    return {
        "validation": {"fashion": [int(1000 * validation), 1000]},
        "test": {"fashion": [int(1000 * own), 1000]},
        "asr": [int(1000 * asr), 1000],
    }


@pytest.fixture
def rows():
    """Two worlds and one target: the base has .4 of the task, the all-clean merge .8."""
    found = {}
    for seed in (0, 1):
        cell = primary.Cell(World(seed, seed), 3, "stealthy", "TIES")
        clean = {"0": point(0.8, 0.8, 0.02)}
        undefended = point(0.79, 0.78, 0.9)
        found[cell._replace(rule="task arithmetic"), "controls"] = {
            "base": point(0.4, 0.4, 0.05),
            "clean model": point(0.9, 0.9, 0.01),
        }
        found[cell, "none"] = {"front": {"0": undefended}, "clean": clean, "flagged": [], "false": []}
        shrunk = {"0.5": point(0.7, 0.6, 0.3), "1": point(0.4, 0.4, 0.05)}
        found[cell, "shrinking"] = {"front": shrunk, "clean": clean, "flagged": [], "false": []}
        mine = {"1": point(0.785, 0.76, 0.1), "1.5": point(0.6, 0.6, 0.06)}
        found[cell, "bank: disarm"] = {"front": mine, "clean": clean, "flagged": ["fashion"], "false": []}
    return found


def test_defenses_are_compared_where_they_keep_the_same(rows):
    cell = next(c for c, name in rows if name == "none")
    assert second_tables.value_at(rows, cell, "ship the base", 0.9, "fashion") == (5.0, False)
    value, reached = second_tables.value_at(rows, cell, "shrinking", 0.9, "fashion")
    assert reached
    assert value == pytest.approx(90 - 60 * (0.95 - 0.9) / (0.95 - 0.5))
    value, reached = second_tables.value_at(rows, cell, "bank: disarm", 0.9, "fashion")
    assert reached
    assert value == pytest.approx(10.0)
    kept = {
        **rows,
        (cell, "late"): {**rows[cell, "shrinking"], "front": {"0": point(0.7, 0.7, 0.9), "1": point(0.4, 0.4, 0.05)}},
    }
    low = {**kept, (cell, "none"): {**rows[cell, "none"], "front": {"0": point(0.7, 0.7, 0.9)}}}
    assert second_tables.value_at(low, cell, "late", 0.9, "fashion") == (90.0, False)  # not used, so undefended


def test_the_strength_is_the_largest_within_a_point_of_the_best(rows):
    cell = next(c for c, name in rows if name == "none")
    row = second_tables.whole_front(rows, cell, "bank: disarm")
    assert second_tables.chosen(row) == rows[cell, "bank: disarm"]["front"]["1"]
    row = second_tables.whole_front(rows, cell, "shrinking")
    assert second_tables.chosen(row) == rows[cell, "none"]["front"]["0"]


def test_the_tables_show_the_base_and_what_was_reached(rows):
    text = second_tables.tables(rows, list(DEFENCES), "fashion")
    assert "ship the base" in text
    assert "clean single model: ASR 1.0" in text
    line = next(line for line in text.splitlines() if line.startswith("TIES") and "ship the base" in line)
    assert line.split()[-4:] == ["2,", "0", "of", "2"]
    assert "the bank flags the attacker" not in text  # counted under task arithmetic


def test_the_leaderboard_ranks_what_ran_in_as_many_merges_and_says_what_each_is_given(rows):
    given = {name: f"given {name}" for name in ("none", "shrinking", "bank: disarm", "late", "oracle")}
    cells = {c for c, n in rows if n == "none"}
    rows |= {(min(cells), "oracle"): rows[min(cells), "shrinking"]}
    lines = second_tables.leaderboard(rows, given, "fashion").splitlines()[4:]
    names = [line.split("given ")[1] if "given" in line else "ship the base" for line in lines]
    assert names[0] == "ship the base"
    ranked = [name for name in names if name in ("none", "shrinking", "bank: disarm")]
    values = {n: sum(second_tables.value_at(rows, c, n, 0.9, "fashion")[0] for c in cells) for n in set(ranked)}
    assert ranked[:3] == sorted(values, key=values.__getitem__)
    assert names[-1] == "oracle"


def test_your_defense_is_measured_beside_ours(tmp_path, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("def half(model, base, strength):\n    return {n: (x + base[n]) / 2 for n, x in model.items()}\n")
    defence = defence_of(f"{mine}:half")
    here = scene()
    found = defence.defend(here, 0.5)
    assert torch.allclose(found["w"], (merged(here)["w"] + here.base["w"]) / 2)
    assert defence.strengths[-1] == 1.0
    assert defence_of("bank: disarm") is DEFENCES["bank: disarm"]
    cell = primary.every_cell()[0]
    before = primary.key_of(cell, f"{mine}:half")
    other = tmp_path / "other.py"
    other.write_text(mine.read_text().replace("/ 2", "/ 3"))
    assert primary.key_of(cell, f"{other}:half") != before
    with pytest.raises(primary.argparse.ArgumentTypeError, match="not 'bank: disram'"):
        primary.defence_name("bank: disram")


def test_sign_flips_and_holm():
    assert significance.sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert significance.sign_flip([1.0, -1.0]) == 1.0
    assert significance.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


@pytest.mark.parametrize(("t", "freedom"), [(12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.447, 6), (2.093, 19)])
def test_students_t_has_the_tabulated_quantiles(t, freedom):
    assert significance.beyond(t, freedom) == pytest.approx(0.05, abs=1e-4)


def test_a_t_test_of_paired_differences():
    values = [1.0, 2.0, 3.0]  # t = 2 / (1 / sqrt(3)), two degrees of freedom
    assert significance.t_test(values) == pytest.approx(significance.beyond(3.4641, 2), abs=1e-4)
    assert significance.t_test([2.0, 2.0]) == 0.0
    assert significance.t_test([0.0, 0.0]) == 1.0


def test_a_merge_without_gain_is_not_a_number():
    assert second_tables.Reference(0.8, 0.8, 0.1).gain(0.9) != second_tables.Reference(0.8, 0.8, 0.1).gain(0.9)


def test_the_page_shows_what_the_rows_give():
    if not (primary.cells.FOLDER / primary.TABLE).exists():
        pytest.skip("the rows are in the repository only")
    wanted, pages = primary.every_cell(), Path(__file__).parents[1] / "docs" / "tables"
    found = second_tables.tables(primary.kept_rows(wanted), list(DEFENCES), primary.TASK)
    assert (pages / "primary.txt").read_text("utf-8").strip() == found.strip()
    assert (pages / "leaderboard.txt").read_text("utf-8").strip() == primary.board(wanted).strip()


# defenses


def scene(**changes):
    names = data.TASKS
    base = {"w": torch.zeros(40, 5)}
    random = torch.Generator().manual_seed(0)
    vectors = {t: TaskVector.between(base, {"w": torch.randn(40, 5, generator=random)}) for t in names}
    probes = {c: probe_of(base, random) for c in range(10)}
    found = {"fashion": [probes[3]]}
    return Scene(
        base, "fashion", vectors, RULES["task arithmetic"], probes, found, ("fashion", 3),
        [vectors[t] for t in names if t != "fashion"], probes[3],
    )._replace(**changes)  # fmt: skip


def probe_of(base, random):
    return BackdoorVector.between(clean=base, backdoored={"w": torch.randn(40, 5, generator=random)}, pretrained=base)


@pytest.mark.parametrize("count", [2, 4])
def test_averaging_takes_so_many_clean_models_of_the_task(count):
    own = scene()
    averaged = torch.stack([own.vectors["fashion"]["w"], *(v["w"] for v in own.others[:count])]).mean(0)
    unlike = scene(vectors=dict(own.vectors) | {"fashion": TaskVector.between(own.base, {"w": averaged})})
    found = DEFENCES[f"WAG + {count}"].defend(own, 1.0)
    assert torch.allclose(found["w"], merged(unlike)["w"], atol=1e-6)


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defense_changes_the_merge_and_ends_at_the_base_or_not(name):
    own = scene()
    defence = DEFENCES[name]
    models = [dict(defence.defend(own, by)) for by in defence.strengths]
    whole = dict(merged(own))
    if name == "none":
        assert torch.equal(models[0]["w"], whole["w"])
        return
    assert not torch.equal(models[0]["w"], whole["w"])
    ends = name not in ("random vector of its norm", "consensus of the bank", "oracle") and "the bank's" not in name
    assert torch.allclose(models[-1]["w"], own.base["w"]) == ends


def test_nobody_flagged_means_nothing_disarmed():
    own = scene(found={})
    for name in ("bank: disarm", "bank: leave out", "bank: halve", "bank: disarm by size"):
        assert torch.equal(DEFENCES[name].defend(own, 1.0)["w"], merged(own)["w"])
