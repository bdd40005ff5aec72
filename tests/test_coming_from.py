"""The translation tables: every line of ours is Python that runs, and mergekit's give what mergekit gives."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taskvec import TaskVector, load, merge, merges, presets, save, save_adapter, schedules, sparsify

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text("utf-8")
LINES = [
    code
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| ---")
    for code in re.findall(r"`([^`]+)`", line.split(" | ")[-1])
]


def model(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.{part}.weight": torch.randn(6, 6, generator=random) for i in range(2) for part in ("mlp", "attn")
    }


@pytest.mark.parametrize("code", LINES)
def test_a_line_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, models = model(0), [model(1), model(2)]
    vectors = [TaskVector.between(base, one) for one in models] * (2 if "vectors[2]" in code else 1)
    save(models[0], "tuned.safetensors")
    save_adapter(vectors[0], "adapter", rank=4)
    merged = merge(vectors, merges.mean)
    grams = [{name: torch.eye(6) for name in base}] * 2
    known = {name: getattr(module, name) for module in (merges, sparsify) for name in module.__all__}
    known |= {"TaskVector": TaskVector, "load": load, "merge": merge, "presets": presets, "schedules": schedules}
    known |= {"save_adapter": save_adapter, "base": base, "models": models, "vectors": vectors, "grams": grams}
    known |= {"merged": merged, "vector": vectors[0], "save": lambda *_, **options: options}
    if re.match(r"\w+=", code):  # an option: of a rule that takes it
        rules = {"density": "ties", "t": "slerp", "rescale": "dare_mergekit", "by": "ties"}
        rule = rules[code.split("=")[0]]
        given = models if rule == "slerp" else vectors
        more = ", density=0.5, seed=0" if rule == "dare_mergekit" else ', scope="tensor"' if rule == "ties" else ""
        place = "presets." if rule == "dare_mergekit" else ""
        code = f"merge({'models' if given is models else 'vectors'}, {place}{rule}, {code}{more})"
    assert eval(code, known) is not None


GOLDEN = json.loads((Path(__file__).parent / "golden" / "coming_from.json").read_text())
MERGEKIT = {
    name + ("_f" if "filter_wise" in rest else ""): code
    for name, rest, code in re.findall(
        r"^\| `(\w+)`(.*?) \| `(merge\(.*)` \|$", PAGE.split("## PEFT")[0], flags=re.MULTILINE
    )
}


def test_every_method_of_mergekit_is_compared_but_slerp():
    assert {case["name"] for case in GOLDEN["cases"]} == set(MERGEKIT) - {"slerp"}  # in slerp_mergekit.json


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_a_line_gives_what_mergekit_gives(case):
    """Where entries are dropped at random, at density 1: of the masks only the numbers differ."""
    base, *models = (
        {name: torch.tensor(x, dtype=torch.float64) for name, x in one.items()}
        for one in (GOLDEN["base"], *GOLDEN["models"])
    )
    known = {name: getattr(module, name) for module in (merges, sparsify) for name in module.__all__}
    known |= {"merge": merge, "presets": presets, "base": base, "models": models}
    known["vectors"] = [TaskVector.between(base, one) for one in models]
    code = MERGEKIT[case["name"]]
    if case["name"].startswith(("dare", "della")):
        code = re.sub(r"density=0\.\d", "density=1.0", re.sub(r"epsilon=0\.\d", "epsilon=0.0", code))
    found = eval(code, known)
    found = found.apply(base) if isinstance(found, TaskVector) else found
    for name, wanted in case["output"].items():
        torch.testing.assert_close(found[name], torch.tensor(wanted, dtype=torch.float64), rtol=1e-8, atol=1e-8)
