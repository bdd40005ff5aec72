"""The same functions on another device. These need CUDA and are skipped where there is none.

Without one, the contract runs every rule with the default device set to meta, see test_contract.py.
"""

import pytest
import torch

from taskvec import BackdoorVector, TaskVector, merge
from taskvec.attacks import sparse_backdoor
from taskvec.attacks.triggers import random_patch, stamp
from taskvec.defenses import random_twin, shuffled_twin
from taskvec.errors import MismatchError
from taskvec.merges import breadcrumbs, dare, della, magmax, mean, model_stock, ties, total
from taskvec.metrics import cosine_matrix

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RULES = [
    (mean, {}),
    (total, {}),
    (ties, {"density": 0.2}),
    (ties, {"density": 0.2, "scope": "row", "zero": "positive"}),
    (ties, {"density": 0.2, "zero": "majority"}),
    (dare, {"density": 0.5, "seed": 1}),
    (dare, {"density": 0.5, "seed": 1, "rescale": "l1"}),
    (breadcrumbs, {"density": 0.3, "outliers": 0.05}),
    (della, {"density": 0.5, "epsilon": 0.2, "seed": 1}),
    (magmax, {}),
    (model_stock, {}),
]


def vectors(kind: type[TaskVector] = TaskVector) -> list[TaskVector]:
    def one(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {"a": torch.randn(300, 257, generator=g), "b": torch.randn(40, generator=g).bfloat16().float()}

    return [kind(one(seed)) for seed in range(4)]


@cuda
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_rules_give_the_same_on_cuda_and_select_the_same_entries(rule, options):
    here = merge(vectors(), rule, **options)
    there = merge([v.to("cuda") for v in vectors()], rule, **options)
    moved = merge(vectors(), rule, device="cuda", **options)
    for name in here:
        assert there[name].device.type == moved[name].device.type == "cuda"
        assert torch.equal(here[name] != 0, there[name].to("cpu") != 0)
        assert torch.allclose(here[name], there[name].to("cpu"), atol=1e-6)
        assert torch.equal(there[name], moved[name])


@cuda
def test_measures_twins_and_attacks_run_where_the_tensors_are():
    here, there = vectors(BackdoorVector), [v.to("cuda") for v in vectors(BackdoorVector)]
    assert torch.isclose(here[0].norm(), there[0].norm().to("cpu"))
    assert torch.allclose(cosine_matrix(here), cosine_matrix(there).to("cpu"))
    assert sparse_backdoor(there).to("cpu").allclose(sparse_backdoor(here), rtol=1e-4)
    assert random_twin(there[0], seed=1).to("cpu").allclose(random_twin(here[0], seed=1), rtol=1e-4)
    assert shuffled_twin(there[0], seed=1).to("cpu").allclose(shuffled_twin(here[0], seed=1))
    patch = random_patch(3, (1, 8, 8), seed=0)
    assert stamp(torch.zeros(2, 1, 8, 8, device="cuda"), patch).device.type == "cuda"


@cuda
def test_devices_do_not_mix_unasked():
    here, there = vectors()[0], vectors()[1].to("cuda")
    with pytest.raises(MismatchError, match="say where to compute"):
        merge([here, there], mean)
    assert merge([here, there], mean, device="cuda")["a"].device.type == "cuda"
