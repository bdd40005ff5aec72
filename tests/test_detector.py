"""The detector's experiment: whom it screens, and what its tables make of it."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import detector
from bench import data, detector_tables

sys.path.pop(0)

from taskvec import BackdoorVector, TaskVector


def test_there_are_as_many_contributors_as_the_page_says():
    found = detector.cases(detector.WORLDS)
    clean = [job for case in found if not case.attack for job in detector.contributors(case).values()]
    attacked = [detector.attacker(case) for case in found if case.attack]
    assert len(set(clean)) == len(clean) == 200
    assert len({(case.world, case.merge) for case in found if not case.attack}) == 40
    assert len(set(attacked)) == len(attacked) >= 100
    assert len({(job.steps, job.rate) for job in clean}) == 9
    assert not {job.twin() for job in attacked} & set(clean)


def test_an_attacker_takes_the_place_of_a_clean_contributor():
    clean = detector.Case(detector.WORLDS[0], 3)
    attacked = clean._replace(attack="warped", target=2)
    mine, theirs = detector.contributors(clean), detector.contributors(attacked)
    assert [task for task in data.TASKS if mine[task] != theirs[task]] == [detector.TASK]
    assert theirs[detector.TASK].attack == detector.ATTACKS["warped"]
    assert detector.key_of(clean) != detector.key_of(attacked)


def test_a_strangers_bank_is_of_another_base():
    for world in detector.WORLDS:
        assert detector.other_base(world).base != world.base


def test_models_that_others_are_compared_with_come_first():
    jobs = detector.everything(detector.cases(detector.WORLDS[:1]))
    assert len(set(jobs)) == len(jobs)
    place = {job: i for i, job in enumerate(jobs)}
    probes = [job for job in jobs if job.rows == "few" and job.attack is not None]
    assert len(probes) == 30  # its own with the public head and with one of its own, and those of another base
    assert all(place[job.twin()] < place[job] for job in probes)


def test_an_attacker_along_a_probe_is_seen_by_its_own_bank_alone(monkeypatch):
    names = {world: i for i, world in enumerate(detector.WORLDS)}

    def noise(seed: int) -> dict[str, torch.Tensor]:
        return {"w": torch.randn(60, 50, generator=torch.Generator().manual_seed(seed))}

    def plus(x, y, factor=1):
        return {"w": x["w"] + factor * y["w"]}

    def probes(world, _task, *, own_head=False):
        base = noise(2000 + world.base)  # recorded, as a real probe's is
        return {c: BackdoorVector.between(clean=base, backdoored=plus(base, noise(1000 + 10 * names[world] + c)),
                                          pretrained=base) for c in range(10)}  # fmt: skip

    def vector(job):
        base, own = noise(2000 + job.world.base), noise(data.TASKS.index(job.task))
        if job.attack:
            own = plus(own, noise(1000 + 10 * names[job.world] + job.target), 2)
        return TaskVector.between(base, plus(base, own))

    monkeypatch.setattr(detector, "probes", probes)
    monkeypatch.setattr(detector.second, "vector", vector)
    monkeypatch.setattr(detector.zoo, "base", lambda setting: noise(2000 + setting.base_seed))
    monkeypatch.setattr(detector, "fooled", lambda job, _: [job.target, 10])
    clean = detector.Case(detector.WORLDS[0], 0)
    for case, flagged in ((clean, []), (clean._replace(attack="noisy", target=7), ["fashion"])):
        row = detector.measured(case)
        assert row["flagged"] == flagged
        assert (row["bank"]["fashion"] > 1) == (row["bank without the head"]["fashion"] > 1.9) == bool(flagged)
        assert row["bank of another base"]["fashion"] < 0.2
        assert row["asr"] == ({"task arithmetic": [7, 10], "TIES": [7, 10]} if flagged else {})
        assert {*row["norm"]} == {*row["leading"]} == {*data.TASKS}


class Case(NamedTuple):
    world: int
    attack: str


def row(fashion: float, flagged: list[str], asr: int = 0):
    values = {"fashion": fashion, "mnist": 0.1}
    return dict.fromkeys(detector_tables.STATISTICS, values) | {"flagged": flagged, "asr": {"TIES": [asr, 10]}}


@pytest.fixture
def rows():
    return {
        Case(0, ""): row(0.2, []),
        Case(1, ""): row(0.3, ["mnist"]),
        Case(0, "patch"): row(0.9, ["fashion"], 8),
        Case(1, "patch"): row(0.25, ["mnist"], 6),
    }


def test_an_attack_is_told_from_the_clean_contributors(rows):
    line = detector_tables.attack_line(rows, "patch", "fashion")
    # 0.9 is above all four clean values, 0.25 above three of them
    assert line == ["patch", "70", *["0.88 / 0.50"] * 5, "1 of 2"]


def test_false_alarms_are_counted_by_merges(rows):
    clean, attacked = detector_tables.alarms(rows, "fashion")
    assert clean[:3] == ["all clean", 1, 2]
    assert attacked[:3] == ["with an attacker", 1, 2]
    assert clean[4] == attacked[4] == 1


def test_the_tables_say_what_they_are_of(rows):
    text = detector_tables.tables(rows, "fashion")
    assert "2 worlds: 4 clean contributors" in text
    assert detector_tables.tables({}, "fashion") == "there are no rows yet"


def test_the_page_shows_what_the_rows_give():
    if not (detector.cells.FOLDER / detector.TABLE).exists():
        pytest.skip("the rows are in the repository only")
    page = (Path(__file__).parents[1] / "docs" / "tables" / "detector.txt").read_text("utf-8")
    assert page.strip() == detector.kept_tables(detector.cases(detector.WORLDS)).strip()
