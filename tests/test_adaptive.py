"""Attackers who know the detector: what they keep low, and what the tables make of them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import adaptive
import detector
from adaptive import Case, Shown
from bench import cells, data, evading, pictures, second
from bench.evading import Evader
from bench.second import Attack, Job

sys.path.pop(0)

from taskvec import BackdoorVector, TaskVector, defenses


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_coefficients_are_those_of_least_squares():
    base = {"w": random(6, 5, seed=0), "b": random(5, seed=1)}
    probes = [BackdoorVector({n: random(*x.shape, seed=10 + i) for n, x in base.items()}) for i in range(3)]
    weights = [0.5, -2.0, 0.25]
    tuned = {n: x + sum(w * p[n] for w, p in zip(weights, probes, strict=True)) for n, x in base.items()}
    loss = evading.coefficients(base, probes)
    assert float(loss(tuned, None, 0)) == pytest.approx(sum(w * w for w in weights), rel=1e-4)
    assert float(loss(base, None, 0)) == 0


def test_a_clean_model_is_as_usual_and_a_long_or_steep_one_is_not():
    base = {"w": random(12, 10, seed=0), "b": random(5, seed=1)}
    clean = {n: x + random(*x.shape, seed=2) for n, x in base.items()}
    loss = evading.unlike(base, clean)

    def settled(params):  # the power method takes a few calls
        return [float(loss(params, None, step)) for step in range(60)][-1]

    assert settled(clean) == pytest.approx(0, abs=1e-3)
    assert settled({n: base[n] + 3 * (clean[n] - base[n]) for n in base}) == pytest.approx(4, rel=1e-3)
    steep = {**clean, "w": base["w"] + torch.outer(random(12, seed=3), random(10, seed=4))}
    shared = float(evading.share(clean["w"] - base["w"]))
    norm = float(TaskVector.between(base, steep).norm() / TaskVector.between(base, clean).norm())
    assert settled(steep) == pytest.approx((norm - 1) ** 2 + 1 - shared, rel=1e-3)


def test_the_share_is_what_the_screening_says():
    x = random(7, 4, seed=0)
    vectors = [TaskVector({"w": x}), TaskVector({"w": random(7, 4, seed=1)})]
    assert float(evading.share(x)) == pytest.approx(defenses.screen(vectors)[0].leading, rel=1e-5)


def test_the_penalty_keeps_low_what_it_is_on(world):
    job = Job(world, "mnist", attack=Attack("random", 3), target=1, steps=12)
    found = {p: evading.model(Evader(job, "weights", p)) for p in (0.0, 1000.0)}
    clean = float(second.vector(job.twin()).norm())
    base = second.zoo.base(world.setting)
    far = {p: abs(float(TaskVector.between(base, params).norm()) / clean - 1) for p, params in found.items()}
    assert far[1000.0] < far[0.0]


@pytest.mark.parametrize("kind", ["their bank", "all", "bank", "both"])
def test_a_penalty_on_a_bank_keeps_its_coefficients_low(kind, world, monkeypatch):
    job = Job(world, "mnist", attack=Attack("random", 3), target=1, steps=12)
    theirs = {c: Job(world, "mnist", "few", Attack("random", 3), c, steps=2) for c in (1, 2)}
    monkeypatch.setattr(evading.second, "bank", lambda *_: theirs)
    monkeypatch.setattr(evading, "own_bank", lambda job: [own._replace(draw=5) for own in theirs.values()])
    used = evading.bank_of(Evader(job, kind, 0.0))
    assert {own.draw for own in used} == ({0} if kind in ("their bank", "all") else {5})
    base = second.zoo.base(world.setting)
    loss = evading.coefficients(base, [second.probe(own) for own in used])
    found = {p: float(loss(evading.model(Evader(job, kind, p)), None, 0)) for p in (0.0, 3000.0)}
    assert found[3000.0] < 0.5 * found[0.0]


def test_two_halves_are_the_backdoor_and_each_alone_is_hidden(world):
    job, partner = Job(world, "fashion", attack=Attack("random", 3), target=1, steps=3), Job(world, "mnist", steps=3)
    own, other = evading.halves(job, partner)
    planted = second.vector(job) - second.vector(job.twin())
    whole = second.vector(job) + second.vector(partner)
    assert (own + other).allclose(whole, atol=1e-5)
    hidden = own - second.vector(job.twin())
    assert float(hidden.norm() / planted.norm()) == pytest.approx(0.5**0.5, rel=0.1)


def test_every_case_is_another_row(world):
    found = adaptive.cases([world], [2])
    assert len({adaptive.key_of(case) for case in found}) == len(found) == 18
    assert {adaptive.evader_of(case) for case in found if case.kind in ("none", "halves", "one half")} == {None}


def test_a_case_is_measured(world, monkeypatch):
    monkeypatch.setattr(adaptive, "STEALTHY", Attack("random", 3))
    bank = {c: BackdoorVector(dict(second.vector(Job(world, "mnist", draw=c)))) for c in range(3)}
    monkeypatch.setattr(detector, "probes", lambda world, task, **_: bank)
    contributors = {task: Job(world, task, steps=2) for task in data.TASKS}
    monkeypatch.setattr(adaptive.second, "contributors", lambda world: contributors)
    monkeypatch.setattr(adaptive, "job_of", lambda case: Job(world, "fashion", attack=Attack("random", 3), steps=2))
    both, one = (adaptive.measured(Case(world, 0, kind)) for kind in ("halves", "one half"))
    assert set(both["alone"]["bank"]) == set(data.TASKS)
    assert len(both["pairs"]["leading"]) == 10
    assert both["alone"]["bank"]["mnist"] != one["alone"]["bank"]["mnist"]
    assert both["alone"]["bank"]["fashion"] == one["alone"]["bank"]["fashion"]
    assert all(n == 600 for _, n in both["right"].values())


# tables


def row(bank: float, leading: float, asr: int):
    values = {"bank": bank, "leading": leading, "norm": 1.0}
    alone = {name: {"fashion": value, "mnist": 0.0} for name, value in values.items()}
    pairs = {name: {"mnist + fashion": value, "mnist + animal": 0.5} for name, value in values.items()}
    return {
        "alone": alone,
        "pairs": pairs,
        "asr": {key: [asr, 100] for key in adaptive.MERGES},
        "right": {key: [300, 600] for key in adaptive.MERGES},
    }


def test_the_best_statistic_of_each_attacker_counts():
    world = adaptive.WORLDS[0]
    clean = {world: {"bank": [0.1, 0.2, 0.3, 0.4], "leading": [0.1, 0.2, 0.3, 0.4], "norm": [1.0, 1.0, 1.0, 1.0]}}
    rows = {Case(world, 2): row(0.5, 0.25, 90), Case(world, 7): row(0.05, 0.35, 70)}
    (found,) = adaptive.shown(rows, clean)
    assert found.beaten == {"bank": 50, "leading": 37.5, "norm": 100}
    assert found.lowest == (0 + 25) / 2
    assert found.asr["TIES"] == [90, 70]
    text = adaptive.table([found], 1)
    assert "80.0" in text
    assert "50.0" in text


def test_a_world_whose_clean_contributors_are_not_known_is_left_out():
    assert adaptive.shown({Case(adaptive.WORLDS[0], 2): row(0.5, 0.25, 90)}, {}) == []


def test_a_sum_is_ranked_among_all_sums():
    rows = {Case(adaptive.WORLDS[0], t, "halves"): row(bank, 0.4, 50) for t, bank in ((2, 0.9), (7, 0.1))}
    lines = adaptive.pairs_table(rows).splitlines()
    assert next(line for line in lines if line.startswith("bank")).split() == ["bank", "1", "2", "1.5"]
    assert next(line for line in lines if line.startswith("leading")).split() == ["leading", "0", "2", "2.0"]


def test_the_picture_has_a_line_for_each_kind(tmp_path):
    found = [
        Shown(
            kind,
            penalty,
            {m: [50.0, 60.0] for m in adaptive.MERGES},
            {},
            {"bank": penalty, "leading": 7.0},
            penalty / 2,
        )
        for kind, penalty in (("none", 0.0), ("bank", 30.0), ("bank", 40.0), ("halves", 0.0))
    ]
    series = adaptive.frontier_of(found)
    assert len(series) == 6
    assert list(series["TIES: the bank"]) == ["hides nothing", "from a bank of its own", "two with half of it each"]
    assert series["TIES: the bank"]["from a bank of its own"] == [(0.0, 55.0), (30.0, 55.0), (40.0, 55.0)]
    best = series["task arithmetic: the best of three"]
    assert best["from a bank of its own"] == [(0.0, 55.0), (15.0, 55.0), (20.0, 55.0)]
    assert series["TIES: the spectrum"]["two with half of it each"] == [(7.0, 55.0)]
    pictures.frontier(tmp_path / "x.png", series)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_page_shows_what_the_rows_give():
    if not adaptive.ROWS.exists():
        pytest.skip("the rows are in the repository only")
    page = (Path(__file__).parents[1] / "docs" / "tables" / "adaptive.txt").read_text("utf-8")
    assert page.strip() == adaptive.kept_tables(adaptive.cases()).strip()


def test_what_the_detector_has_seen_is_read(monkeypatch, tmp_path):
    if not (cells.FOLDER / detector.TABLE).exists():
        pytest.skip("the rows are in the repository only")
    world = adaptive.WORLDS[0]
    known = adaptive.clean_values([world])
    assert set(known) == {world}
    assert all(len(values) == 40 for values in known[world].values())
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    assert adaptive.clean_values([world]) == {}
