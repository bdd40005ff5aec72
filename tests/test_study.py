"""The study: attackers, defences and tables, on an encoder that has hardly been trained."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import study
import study_bank
import study_inherent
import study_sbv
import study_screening
import study_vectors
from bench import attackers, cells, data, defenders, handed, mine, tables, zoo

sys.path.pop(0)

from taskvec import TaskVector
from taskvec.metrics import coefficients

# attackers


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in handed.ATTACKERS if name != "against the bank"])
def test_every_attacker_hands_in_what_differs_from_clean(name, setting):
    found = handed.ATTACKERS[name](setting, "mnist", 1, 0)
    clean = handed.contributors(setting, 0)
    assert found.plan.rows == "attacker"
    owners = {"none": set(), "colluding": {"mnist", "fashion"}, "BadMerging-off": {"fashion"}}
    assert set(found.models) == owners.get(name, {"mnist"})
    for task, model in found.models.items():
        assert any(not torch.equal(model[n], clean[task][n]) for n in model)
    stolen = handed.planted(setting, found, clean)
    assert (float(stolen.norm()) > 0) is (name != "none")


@pytest.mark.slow
def test_colluders_add_up_to_one_backdoor(setting):
    alone = handed.ATTACKERS["BadMerging-on"](setting, "mnist", 1, 0)
    both, clean = handed.colluding(setting, "mnist", 1, 0), handed.contributors(setting, 0)
    assert handed.planted(setting, both, clean).allclose(handed.planted(setting, alone, clean), atol=1e-5)


@pytest.mark.slow
def test_an_attacker_who_penalises_his_coefficients_has_smaller_ones_on_his_bank(setting, monkeypatch):
    monkeypatch.setitem(data.CLASSES, "mnist", ("0", "1"))  # a bank of two
    plan = attackers.on_task("mnist", 1, 0)._replace(rows="attacker")
    base = zoo.base(setting)
    bank = [
        attackers.backdoor_vector(setting, attackers.probe("mnist", c, attackers.OWN_BANK, "attacker")) for c in (0, 1)
    ]

    def largest(own):
        vector = TaskVector.between(base, attackers.upload(setting, own))
        return float(coefficients([vector], bank).abs().max())

    assert largest(plan._replace(evade="bank")) < largest(plan)


def test_the_defender_shares_no_row_with_a_contributor():
    for task in data.TASKS:
        theirs, own = (zoo.rows_of(task, rows).images for rows in (handed.ROWS, defenders.ROWS))
        assert len(theirs) + len(own) == len(data.pool(task).images)
        few = zoo.rows_of(task, "few").images
        assert len(few) == 10 * len(data.CLASSES[task])
        assert all((own == image).flatten(1).all(1).any() for image in few[:5])
    assert all(target not in study.TARGETS for target in defenders.PROBE_CLASSES)
    plans = [plan for by_place in defenders.Bank(("mnist",)).plans().values() for plan in by_place]
    assert {plan.rows for plan in plans} == {defenders.ROWS}
    assert min(plan.seed for plan in plans) > max(study.SEEDS)


# cells


@pytest.fixture
def measured(monkeypatch):
    asked = []

    def stand_in(_cell, _attack, _attacked, _clean, name, _done):
        asked.append(name)
        return {"strength": 0.5}

    monkeypatch.setattr(study, "measured", stand_in)
    monkeypatch.setattr(study, "scene", lambda *_: None)
    monkeypatch.setitem(study.ATTACKERS, "none", lambda *_: handed.Handed({}, attackers.on_task("mnist", 1, 0)))
    return asked


BANK = defenders.Bank(("mnist",))


def cell(*names: str, **other: object) -> study.Cell:
    return study.Cell("vits", "mnist", 1, 0, "none", ("TIES",), names, BANK)._replace(**other)


def test_a_cell_is_filled_row_by_row_and_only_where_it_is_empty(measured, tmp_path):
    study.fill(tmp_path, cell("none"))
    study.fill(tmp_path, cell("none", "IBVS"))
    study.fill(tmp_path, cell("none", "IBVS"))
    assert measured == ["none", "IBVS"]
    kept = cells.read(tmp_path / study.TABLE)
    assert not study.missing(cell("none", "IBVS"), kept)
    assert study.missing(cell("none", "ours"), kept)
    study.fill(tmp_path, cell("none", bank=defenders.Bank(("mnist", "fashion"))))  # another bank: another measurement
    assert measured == ["none", "IBVS", "none"]


def test_a_run_that_is_stopped_keeps_the_rows_it_has(measured, tmp_path, monkeypatch):
    whole = study.measured

    def stopping(*args):
        if args[4] == "shrinking":
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(study, "measured", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.fill(tmp_path, cell("none", "IBVS", "shrinking", "ours"))
    assert list(study.earlier(tmp_path, cell("none", "IBVS", "shrinking", "ours"))["TIES"]) == ["none", "IBVS"]


def test_a_changed_defense_is_measured_again(measured, tmp_path, monkeypatch):
    study.fill(tmp_path, cell("shrinking", "clipping"))
    shrinking = defenders.DEFENCES["shrinking"]
    monkeypatch.setitem(defenders.DEFENCES, "shrinking", shrinking._replace(strengths=(0.5,)))
    study.fill(tmp_path, cell("shrinking", "clipping"))
    assert measured == ["shrinking", "clipping", "shrinking"]
    monkeypatch.setitem(defenders.DEFENCES, "clipping", shrinking._replace(defend=defenders.mixing))
    study.codes.cache_clear()
    study.fill(tmp_path, cell("shrinking", "clipping"))
    assert measured == ["shrinking", "clipping", "shrinking", "clipping"]
    study.codes.cache_clear()


OWN = """
from taskvec import TaskVector
from taskvec.sparsify import topk

def trim(model, base, strength):
    return TaskVector.between(base, model).map(topk, density=1 - strength).apply(base)

trim.strengths = (0.2, 0.9)

def louder(vector, clean):
    return vector.inject(clean, 2.0)

def middle(stack):
    return stack.median(0).values
"""


@pytest.mark.slow
def test_a_strangers_attack_merge_and_defense_stand_beside_all_others(setting, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN)
    trim, louder, middle = (f"{tmp_path / 'mine.py'}:{name}" for name in ("trim", "louder", "middle"))
    monkeypatch.setattr(study, "Setting", lambda _encoder: setting)
    monkeypatch.setattr(study, "QUICK", tmp_path)
    monkeypatch.setattr(study, "ROWS", 20)
    monkeypatch.setattr(study, "OTHER_ROWS", 10)
    monkeypatch.setattr(study, "DEFENCES", {name: defenders.DEFENCES[name] for name in ("none", "shrinking")})
    monkeypatch.setattr(study, "TWINS", {})
    monkeypatch.setattr(study, "MERGES", ("TIES",))
    monkeypatch.setitem(data.CLASSES, "mnist", ("0", "1"))
    monkeypatch.setattr(study.zoo, "workforce", lambda _: ThreadPoolExecutor(1))
    asked = f"--quick --task mnist --targets 1 --attack {louder} --merge {middle} --defence {trim}"
    monkeypatch.setattr(sys, "argv", ["study.py", *asked.split()])
    study.main()
    out = capsys.readouterr().out
    for rule in ("TIES", middle):
        assert f"the attacked task is mnist: {rule}" in out
    assert all(name in out for name in (louder, "BadMerging-on", "none", "shrinking", trim))
    paired = out[out.index("ASR of the first defence minus") :]
    assert any(line.startswith(trim) and "shrinking" in line for line in paired.splitlines())


@pytest.mark.parametrize("name", ["nothing.py:trim", "mine.py:other"])
def test_what_is_not_there_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    with pytest.raises(SystemExit, match=r"there is no Python file|has no function 'other'"):
        mine.defence(name)


@pytest.mark.slow
def test_every_defence_gives_figures_with_controls(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "Setting", lambda _encoder: setting)
    monkeypatch.setattr(study, "ROWS", 20)
    monkeypatch.setattr(study, "OTHER_ROWS", 10)
    monkeypatch.setitem(data.CLASSES, "mnist", ("0", "1"))
    own = cell(*defenders.DEFENCES, *defenders.TWINS, attack="BadNets")
    with ThreadPoolExecutor(1) as executor:  # any executor does
        study.run(tmp_path, [own], executor)
    rows = study.earlier(tmp_path, own)["TIES"]
    assert list(rows) == [*defenders.DEFENCES, *defenders.TWINS]
    assert [len(rows[name]["draws"]) for name in defenders.TWINS] == [5, 1]
    for name, row in rows.items():
        assert row["draws"][0]["asr"][1] == row["draws"][0]["clean_merge"][1] > 0
        assert set(row["draws"][0]["accuracy"]) == set(data.TASKS), name
    text = tables.everything("title", {own: {"TIES": rows}})
    assert all(name in text for name in rows)
    tables.draw(tmp_path / "front.png", {own: {"TIES": rows}}, "BadNets")
    assert (tmp_path / "front.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_parts_of_the_study_run_to_their_tables(setting, monkeypatch):
    monkeypatch.setattr(study_sbv, "COUNTS", (2,))
    monkeypatch.setattr(study_sbv, "KINDS", ("same trigger", "nothing shared"))
    rows = study_sbv.of_seed(setting, "mnist", 0)
    assert {row["kind"] for row in rows} == set(study_sbv.KINDS)
    assert all(0 <= figures["asr"] <= 1 for row in rows for figures in row["merges"].values())
    assert "task arithmetic, after scaling" in study_sbv.tables("title", rows)
    found = {"0": study_vectors.of_seed(setting, "mnist", 0)}
    assert found["0"]["likeness"]["seed"]["cosine"] > found["0"]["likeness"]["no backdoor"]["cosine"]
    assert "trigger and class, same seed" in study_vectors.tables("title", found)
    point = study_inherent.Point(setting, 10, 1, 0)
    values = study_inherent.value(point)
    assert values["TIES: injected"] == values["TIES: whole"] - values["TIES: inherent"]
    assert "10x10" in study_inherent.table({point: values})


@pytest.mark.slow
def test_screening_runs_to_its_table(setting, monkeypatch):
    monkeypatch.setattr(study_screening, "ATTACKED", BANK.tasks)
    monkeypatch.setattr(study_screening, "BANKED", BANK)
    monkeypatch.setitem(data.CLASSES, "mnist", ("0", "1"))
    monkeypatch.setattr(study_screening, "KINDS", ("BadNets", "amplified"))
    monkeypatch.setattr(study_screening, "TARGET", 1)
    found = {case: study_screening.measured(setting, case) for case in study_screening.cases((0, 1))}
    assert sum(case.kind == "clean" for case in found) == 2 * 2 * len(data.TASKS)
    text = study_screening.tables("title", found)
    assert all(name in text for name in (*study_screening.STATISTICS, "all, kind left out"))


@pytest.mark.slow
def test_banks_are_compared_on_every_attack(setting, monkeypatch):
    monkeypatch.setitem(data.CLASSES, "mnist", ("0", "1"))
    banks = {"one": BANK, "another": BANK}
    monkeypatch.setattr(study_bank, "banks", lambda _task: banks)
    rows = study_bank.of_seed(setting, "mnist", ["BadNets", "BadMerging-on"], 0)
    assert [row["bank"] for row in rows] == 2 * ["none", *banks]
    text = study_bank.tables("title", rows)
    assert all(name in text for name in banks)


def test_a_score_is_that_of_the_attackers_class_or_of_the_highest_where_the_bank_has_none():
    clean, own = {("mnist", 0): 0.1, ("mnist", 1): -0.1}, {("mnist", 0): 0.2, ("mnist", 1): 0.9}
    found = study_bank.scores(["fashion", "mnist"], "mnist", [clean, own], "mnist")
    assert found["score"] == 0.9
    assert found["first"] == 1.0
    assert found["deviations"] == pytest.approx((0.9 - 0.15) / (1.4826 * 0.15))
    other = study_bank.scores(["fashion", "mnist"], "fashion", [clean, own], "animal")
    assert (other["score"], other["first"]) == (0.1, 0.0)


def test_a_statistic_may_tell_by_being_high_or_low():
    low, high = (study_screening.Case(kind, "mnist", 0) for kind in ("BadNets", "amplified"))
    clean = {study_screening.Case("clean", "mnist", seed): {"norm": 1.0 + seed / 10} for seed in range(3)}
    values = study_screening.by_kind({**clean, low: {"norm": 0.5}, high: {"norm": 2.1}}, "norm")
    assert values["BadNets"] == pytest.approx([0.6])
    assert values["amplified"] == pytest.approx([1.0])
    assert values["clean"] == pytest.approx([0.1, 0.0, 0.1])


# tables


def row(asr: int, accuracy: int, strength: float, front: dict[str, tuple[float, float]]) -> dict:
    draw = {"asr": [asr, 100], "clean_merge": [5, 100], "base": [3, 100], "accuracy": {"mnist": [accuracy, 100]}}
    points = {by: {"accuracy": a, "asr": r} for by, (a, r) in front.items()}
    return {"task": "mnist", "strength": strength, "front": points, "draws": [draw]}


def test_shrinking_is_interpolated_to_the_same_accuracy():
    front = {"0": (0.80, 0.9), "0.3": (0.78, 0.5), "0.6": (0.70, 0.1)}
    shrunk, points = row(50, 78, 0.3, front), {float(by): tables.Point(*point) for by, point in front.items()}
    assert tables.shrunk_to(0.78, points) == pytest.approx(0.5)
    assert tables.shrunk_to(0.74, points) == pytest.approx(0.3)
    assert tables.shrunk_to(0.60, points) == 0.1
    assert tables.shrunk_to(0.90, points) == 0.9
    better = row(20, 79, 1.0, {"1": (0.79, 0.2)})
    assert tables.against_shrinking(better, shrunk) == pytest.approx(100 * (0.2 - 0.7))


def test_comparisons_are_paired_by_seed_and_target():
    rows = {}
    for seed, (ours, ibvs) in enumerate(((10, 50), (20, 40))):
        own = cell(attack="BadNets")._replace(seed=seed)
        found = {"none": row(90, 80, 0.0, {}), "ours": row(ours, 79, 1.0, {}), "IBVS": row(ibvs, 78, 0.2, {})}
        rows[own] = {"TIES": found}
    (line,) = [line for line in tables.paired(rows).splitlines() if line.startswith("ours   IBVS")]
    assert "-30.0 +-127.1" in line  # differences of -40 and -20
    whole = tables.table("title", rows, "TIES")
    assert "-1.0 +-0.0" in whole  # what ours costs
    assert "2 x 1" in whole


def test_the_glance_has_every_attack_in_its_column_and_says_what_is_not_there():
    found = {"none": row(90, 80, 0.0, {}), "ours": row(10, 79, 1.0, {})}
    rows = {
        cell(attack="BadNets"): {"TIES": found},
        cell(attack="SBV"): {"TIES": found | {"IBVS": row(80, 78, 0.2, {})}},
    }
    lines = tables.glance("title", rows).splitlines()
    assert lines[3].split() == ["defence", "BadNets", "SBV"]
    assert [line.split() for line in lines[4:]] == [
        ["ship", "the", "base", "3", "3"],
        ["none", "90", "(5)", "90", "(5)"],
        ["IBVS", "-", "80", "(5)"],
        ["ours", "10", "(5)", "10", "(5)"],
    ]


@pytest.mark.parametrize("encoder", ["vits", "vit7"])
def test_the_page_shows_what_the_cells_give(encoder):
    kept = cells.read(cells.FOLDER / study.TABLE)
    if not kept:
        pytest.skip("the cells are in the repository only")
    wanted = study.kept_cells(encoder, "animal")
    rows = {cell: found for cell in wanted if (found := study.earlier(cells.FOLDER, cell, kept))}
    for page, text in study.pages(f"{encoder}, the attacked task is animal", rows).items():
        assert (Path(__file__).parents[1] / "docs" / "tables" / page).read_text("utf-8") == text


def test_the_page_shows_the_families_as_the_cells_give_them():
    if not cells.read(cells.FOLDER / study.TABLE):
        pytest.skip("the cells are in the repository only")
    page = (Path(__file__).parents[1] / "docs" / "tables" / "families.txt").read_text("utf-8")
    assert page == f"{study.families().strip()}\n"


def test_a_family_is_of_seeds_and_leaves_out_what_is_saturated():
    values = {
        ("SBV_SC", 8): (50, 60), ("mean", 8): (40, 45), ("random, same density", 8): (0, 0),
        ("SBV_SC x 1.5", 8): (100, 100), ("single 0 x 1.5", 1): (100, 100),
        **{(f"single {i}", 1): (30 + i, 30 + i) for i in range(8)},
    }  # fmt: skip
    rows = [
        {"seed": seed, "kind": kind, "variant": v, "count": n,
         "merges": {rule: {"asr": pair[seed] / 100} for rule in ("task arithmetic", "TIES")}}
        for kind in ("same trigger", "same trigger, BadMerging") for (v, n), pair in values.items() for seed in (0, 1)
    ]  # fmt: skip
    found = study_sbv.differences(rows, "same trigger", 8, ["TIES"])
    assert found[study_sbv.MEAN]["TIES"] == pytest.approx([10, 15])
    assert found[study_sbv.MEMBER]["TIES"] == pytest.approx([16.5, 26.5])
    assert found["best single"]["TIES"] == pytest.approx([13, 23])
    text = study_sbv.family(rows)
    assert "corrected by Holm over 8" in text
    assert study_sbv.LONGER not in text


def test_a_run_of_some_cells_keeps_the_others_in_the_tables(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(study.zoo, "workforce", lambda _: ThreadPoolExecutor(1))
    found = row(90, 80, 0.0, {})
    monkeypatch.setattr(study, "measured", lambda *_: found)
    for seed in ("0", "1"):
        asked = f"--encoder vits --task mnist --attack none --targets 1 --seeds {seed} --merge TIES"
        monkeypatch.setattr(sys, "argv", ["study.py", *asked.split()])
        study.main()
    out = capsys.readouterr().out
    assert "2 x 1" in out
    assert "90 (5)" in out
    assert [path.name for path in tmp_path.iterdir()] == [study.TABLE]


# vectors


def test_the_variants_of_a_vector_differ_in_what_they_say():
    made = study_vectors.plans("mnist", 0)
    reference = made["reference"]
    assert made["seed"].backdoors == reference.backdoors
    assert made["class"].backdoors[0].pattern == reference.backdoors[0].pattern
    assert made["task"].task == "fashion"
    seeds = [plan.seed for name, plan in made.items() if not name.endswith("same seed")]
    assert len(set(seeds)) == len(seeds)
    of_all = {plan.seed for seed in study_vectors.SEEDS for plan in study_vectors.plans("mnist", seed).values()}
    assert max(of_all) < study_vectors.STRANGER


def test_collections_share_what_they_say_and_keep_one_vector_apart():
    for kind in study_sbv.KINDS:
        *members, apart = study_sbv.collection(kind, "mnist", 3)
        assert len(members) == max(study_sbv.COUNTS)
        assert len({plan.seed for plan in (*members, apart)}) == len(members) + 1
        assert apart.backdoors == members[0].backdoors
        patterns = {plan.backdoors[0].pattern for plan in members}
        targets = {plan.backdoors[0].target for plan in members}
        assert (len(patterns) == 1) is kind.startswith("same trigger")
        assert (len(targets) == 1) is (kind != "nothing shared")


def test_what_is_made_of_a_collection_has_the_mean_norm_of_its_members(setting):
    from taskvec import BackdoorVector

    vectors = [
        BackdoorVector({"w": (1 + i) * torch.randn(500, generator=torch.Generator().manual_seed(i))}) for i in range(3)
    ]
    norm = sum(float(vector.norm()) for vector in vectors) / 3
    made = study_sbv.combined(vectors)
    for name, vector in made.items():
        times = {f"SBV_SC x {study_sbv.LOUDER}": study_sbv.LOUDER}.get(name, 1.0)
        if "not restored" not in name:
            assert float(vector.norm()) == pytest.approx(times * norm, rel=1e-5), name
    assert float(made["mean, norm not restored"].norm()) < norm
