"""What the examples compute with: the older defences, cells that are resumed."""

import json
import linecache
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import backdoor_vectors
import badmerging
from bench import asking, attackers, cells, data, detectors, handed, merges, mine, report, zoo

sys.path.pop(0)
sys.path.pop(0)

ROOT = Path(__file__).parents[1]

# the older defences


def planted(images: torch.Tensor) -> torch.Tensor:
    """Four classes by the mean of four quarters, and a backdoor: a white corner of 2 x 2 means class 2."""
    quarters = images.unfold(2, 14, 14).unfold(3, 14, 14).mean((4, 5)).flatten(1)
    corner = images[:, 0, -2:, -2:].mean((1, 2))
    return 20 * quarters + 20 * corner[:, None] * torch.tensor([0.0, 0.0, 1.0, 0.0])


def inputs(n: int = 60) -> torch.Tensor:
    x = 0.2 * torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x[:, :, -2:, -2:] = 0
    for i in range(n):
        row, column = divmod(i % 4, 2)
        x[i, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 0.6
    x[:, :, -2:, -2:] = 0
    return x


def test_neural_cleanse_finds_a_small_trigger_and_nothing_without_one():
    sizes = [detectors.reversed_trigger(planted, inputs(), c, seed=0, steps=300)[2] for c in range(4)]
    assert min(sizes) == sizes[2]
    assert sizes[2] < min(sizes[:2] + sizes[3:]) / 2
    mask, _, _ = detectors.reversed_trigger(planted, inputs(), 2, seed=0, steps=300)
    assert mask[0, -2:, -2:].mean() > 0.5


def test_an_anomaly_is_counted_in_deviations_below_the_median():
    assert detectors.anomaly_indices([10.0, 12.0, 14.0, 16.0, 1.0]) == pytest.approx(
        [2 / (1.4826 * 2), 0.0, -2 / (1.4826 * 2), -4 / (1.4826 * 2), 11 / (1.4826 * 2)]
    )
    assert detectors.anomaly_indices([3.0, 3.0, 3.0]) == [0.0, 0.0, 0.0]


def test_pruning_silences_the_quietest_units_and_no_others():
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.rand(50, 4)
    activations = detectors.mean_activations(module, params, "1", x)
    assert torch.allclose(activations, module[1](module[0](x)).mean(0))
    cut = detectors.pruned(params, "0", activations, 0.5)
    silent = torch.func.functional_call(module[0], {n[2:]: t for n, t in cut.items() if n[0] == "0"}, (x,)) == 0
    assert silent.all(0).tolist() == [bool(a <= activations.sort().values[2]) for a in activations]
    assert torch.equal(cut["2.weight"], params["2.weight"])
    assert not torch.equal(cut["0.weight"], params["0.weight"])


def test_scale_up_asks_whether_brighter_copies_are_taken_for_the_same():
    x = torch.tensor([0.02, 0.3]).reshape(2, 1, 1, 1)

    def bright(images):
        return (images.flatten(1).mean(1) > 0.1).long()

    # .02 is dark at three times, at the edge at five and bright beyond; .3 is bright throughout
    assert detectors.scaled_consistency(bright, x, (3, 7, 9, 11)).tolist() == [0.25, 1.0]


# cells


@pytest.fixture
def measured(monkeypatch):
    asked = []

    def stand_in(cell, name):
        asked.append(name)
        rates = {what: [8, 10] for what in ("asr", "alone", "clean_merge", "clean_twin", "base")}
        accuracies = {"accuracy": {"mnist": [9, 10]}, "clean_accuracy": {"mnist": [10, 10]}}
        own = {"alone_accuracy": {"upload": [7, 10], "twin": [10, 10]}}
        return [{"victim": "mnist"} | rates | accuracies | own]

    monkeypatch.setattr(badmerging, "measured", stand_in)
    return asked


def cell(*merges: str) -> badmerging.Cell:
    return badmerging.Cell("vits", "mnist", 1, 0, "BadMerging-on", merges)


def test_a_cell_is_measured_once_and_only_the_merges_that_are_missing(measured, tmp_path):
    badmerging.fill(tmp_path, cell("average"))
    badmerging.fill(tmp_path, cell("average", "RegMean"))
    badmerging.fill(tmp_path, cell("average", "RegMean"))
    assert measured == ["average", "RegMean"]
    rows = badmerging.read(tmp_path, [cell("average", "RegMean")])
    found = badmerging.line(rows["BadMerging-on", "average", "mnist"])
    assert (found.asr.mean, found.gain.mean, found.ba.mean, found.cost.mean, found.n) == (80.0, 0.0, 90.0, -10.0, 10)
    assert found.own.mean == pytest.approx(-30.0)
    assert "-30.0" in badmerging.table("title", rows)


def test_a_cell_that_was_made_in_another_way_is_made_anew(measured, tmp_path, monkeypatch):
    badmerging.fill(tmp_path, cell("average"))
    monkeypatch.setattr(badmerging, "ROWS", 7)
    assert badmerging.read(tmp_path, [cell("average")]) == {}
    badmerging.fill(tmp_path, cell("average"))
    assert measured == ["average", "average"]


# lines of results


def test_lines_are_added_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "new" / "table.jsonl"
    assert cells.read(path) == {}
    for i in range(3):
        cells.append(path, cells.key({"row": i % 2}), ["row", i], {"asr": [i, 10]})
    assert cells.read(path) == {cells.key({"row": 0}): {"asr": [2, 10]}, cells.key({"row": 1}): {"asr": [1, 10]}}
    assert len(path.read_text().splitlines()) == 3


def source(body: str) -> str:
    return f'"""A module."""\n\n\ndef helper(x):\n    return x + 1\n\n\n{body}\n'


def loaded(path: Path, body: str):
    path.write_text(source(body))
    mine.function.cache_clear()
    cells._bare.cache_clear()
    linecache.clearcache()
    return cells.code_of(mine.function(f"{path}:trim"))


def test_the_code_of_a_function_is_what_it_and_its_helpers_do_and_not_how_it_is_told(tmp_path):
    path = tmp_path / "own.py"
    first = loaded(path, "def trim(x):\n    return helper(x)")
    told = 'def trim(x: int) -> int:\n    """Trim."""\n    # a comment\n    return helper(x)'
    assert loaded(path, told) == first
    assert loaded(path, "def trim(x):\n    return helper(x) + 1") != first
    before, after = "return x + 1", "return x + 2"
    path.write_text(source("def trim(x):\n    return helper(x)").replace(before, after))
    mine.function.cache_clear()
    cells._bare.cache_clear()
    linecache.clearcache()
    assert cells.code_of(mine.function(f"{path}:trim")) != first


def test_the_functions_of_a_script_count_as_those_of_the_bench_do(tmp_path, monkeypatch):
    """A script's own functions make its rows too, whether it is run (its module is then `__main__`) or imported."""
    monkeypatch.setattr(cells, "FOLDER", tmp_path / "results")

    def code(step, module="script"):
        text = f"def measured(x):\n    return helper(x)\n\n\ndef helper(x):\n    return x + {step}\n"
        (tmp_path / "script.py").write_text(text)
        linecache.clearcache()
        space = {"__name__": module}
        exec(compile(text, str(tmp_path / "script.py"), "exec"), space)
        return cells.code_of(space["measured"])

    assert code(1) == code(1, "__main__") == code(1, "__mp_main__")
    assert code(2) != code(1)


def test_the_arguments_of_a_partial_count(tmp_path):
    first, other = (cells.code_of(partial(attackers.on_task, coefficients=c)) for c in ((1.0, 1.0), (0.2, 1.0)))
    assert first != other
    nested = [
        cells.code_of(partial(handed.from_plan, plan=partial(attackers.plain, trigger=t))) for t in ("a", "b", "a")
    ]
    assert nested[0] == nested[2] != nested[1]


# the demo


def test_what_the_demo_draws_is_ignored_by_git_and_no_tracked_file_is_written():
    ignored = subprocess.run(["git", "check-ignore", "-q", str(backdoor_vectors.PICTURE)], check=False, cwd=ROOT)
    if (ROOT / ".git").exists():
        assert ignored.returncode == 0
    text = (ROOT / "examples" / "backdoor_vectors.py").read_text()
    assert "docs" not in text
    assert text.count("PICTURE") >= 2


def test_every_attack_of_the_table_has_a_plan_that_json_can_hold():
    for name in badmerging.ATTACKS:
        about = badmerging.about(badmerging.Cell("vits", "mnist", 1, 0, name, ()))
        assert json.loads(json.dumps(about)) == about
        assert about["plan"]["task"] == "mnist"


# attackers and merges, on an encoder that has hardly been trained


ON = attackers.on_task("mnist", 1, 0)
PLANS = {
    **{kind: attackers.plain("mnist", 1, 0, kind) for kind in ("random", "dynamic", "trojan", "blended", "warped")},
    "on-task": ON,
    "off-task": attackers.off_task("mnist", "glyph_latin", 1, 0),
    "both": attackers.jointly("mnist", "glyph_latin", 1, 0),
    "with all options": ON._replace(known=True, keep=1.0, normalised=True, draw="sample", stamped=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_every_attacker_hands_in_a_model_that_differs_from_its_clean_twin(name, setting):
    plan = PLANS[name]
    twin = zoo.fine_tuned(setting, zoo.Recipe(plan.task, plan.seed))
    model = attackers.upload(setting, plan)
    assert model.keys() == twin.keys()
    assert all(bool(tensor.isfinite().all()) for tensor in model.values())
    assert any(not torch.equal(model[name], twin[name]) for name in model)
    for backdoor in plan.backdoors:
        images = data.validation(backdoor.victim).images[:8]
        triggered = attackers.trigger_of(setting, plan, backdoor)(images)
        assert not torch.equal(triggered, images)
        assert triggered.min() >= 0
        assert triggered.max() <= 1


@pytest.mark.slow
def test_every_merge_gives_a_model_that_can_be_asked(setting, monkeypatch):
    monkeypatch.setattr(merges, "STEPS", 2)
    models = {task: zoo.fine_tuned(setting, zoo.Recipe(task, 0)) for task in ("mnist", "fashion")}
    predict = asking.predictor(setting, {})
    for name, merger in {**merges.FAST, **merges.SLOW}.items():
        merged = merger(setting, models)
        assert merged.params.keys() == zoo.base(setting).keys(), name
        assert predict(merged, data.validation("fashion").images[:4], "fashion").shape == (4,)
        assert set(merged.adapters) == (set(models) if "surgery" in name else set())


def test_an_off_task_attacker_has_ten_train_images_and_a_shadow_head_of_69_rows(setting):
    (backdoor,) = PLANS["off-task"].backdoors
    reference = attackers._references(backdoor, seed=0)
    pool = data.pool("glyph_latin")
    assert len(reference) == 10
    of_the_class = pool.images[pool.labels == 1].flatten(1)
    assert all(bool((of_the_class == image.flatten()).all(1).any()) for image in reference)
    target, head = attackers._as_seen_by_the_attacker(setting, "mnist", 0, backdoor, data.pool("mnist"))
    assert target == 0
    assert head(torch.randn(3, 128)).shape == (3, 69)


def test_what_a_plan_leaves_at_its_default_is_not_in_its_key():
    told = attackers.key(zoo.Setting(), attackers.plain("mnist", 1, 0))["plan"]
    assert told == {"task": "mnist", "seed": 0, "backdoors": [{"victim": "mnist", "target": 1}]}
    assert attackers.key(zoo.Setting(), ON._replace(keep=1.0))["plan"]["keep"] == 1.0


def test_parts_of_tables_are_kept_with_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FOLDER", tmp_path)
    report.keep("bank", "vits", {"rows": [{"asr": 1 / 3}]})
    report.keep("bank", "vit7", {"rows": []})
    assert report.kept("bank", "vits") == {"versions": report.versions(), "rows": [{"asr": 1 / 3}]}
