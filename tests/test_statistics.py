"""RegMean and its collector; AdaMerging and surgery."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from taskvec import TaskVector, load, merge
from taskvec.calibration import Adapter, adamerging, linear_grams, repaired, surgery
from taskvec.errors import DegenerateError, MismatchError, NonFiniteError, OptionError, RangeError
from taskvec.merges import regmean


def gram(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows / len(rows)


# the collector


def test_grams_of_linear_layers_are_streamed_means():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = [torch.randn(5, 3), torch.randn(2, 7, 3)]
    found = linear_grams(module, dict(module.named_parameters()), batches)
    everything = torch.cat([b.reshape(-1, 3) for b in batches])
    assert torch.allclose(found.matrices["0.weight"], gram(everything))
    assert torch.allclose(found.matrices["2.weight"], gram(module[:2](everything)), atol=1e-6)
    assert found.transposed == {"0.weight": False, "2.weight": False}


def test_both_projections_of_attention_are_seen_though_their_product_is_fused_in_evaluation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    found = linear_grams(layer, dict(layer.named_parameters()), [x]).matrices
    assert set(found) == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert torch.allclose(found["self_attn.in_proj_weight"], gram(x))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_in_training_mode_is_refused():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    with pytest.raises(OptionError, match=r"Sequential is in training mode.*call .eval\(\) first"):
        linear_grams(module, dict(module.named_parameters()), [torch.eye(3)])


def test_functional_calls_are_seen_too():
    module = nn.Linear(3, 2).eval()
    params = load(module)
    found = linear_grams(lambda x: functional_call(module, params, (x,)), params, [torch.eye(3)])
    assert torch.allclose(found.matrices["weight"], torch.eye(3).double() / 3)


class Conv1D(nn.Module):
    """As transformers' GPT-2 has it: weights (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_weights_the_other_way_round_are_told_and_merged_so():
    models = [Conv1D().eval() for _ in range(2)]
    data = [torch.randn(20, 3) for _ in models]
    grams = [linear_grams(m, dict(m.named_parameters()), [x]) for m, x in zip(models, data, strict=True)]
    assert grams[0].transposed == {"weight": True}
    merged = merge(
        [load(m) for m in models],
        regmean,
        gram=[g.matrices for g in grams],
        transposed=grams[0].transposed,
        off_diagonal=1.0,
        ridge=0.0,
    )
    total = sum(gram(x) for x in data)
    expected = torch.linalg.solve(total, sum(gram(x) @ m.weight.double() for m, x in zip(models, data, strict=True)))
    assert torch.allclose(merged["weight"].double(), expected, atol=1e-5)
    assert torch.allclose(merged["bias"], (models[0].bias + models[1].bias) / 2)


def test_collecting_nothing_is_an_error():
    module = nn.Linear(3, 2).eval()
    params = dict(module.named_parameters())
    with pytest.raises(DegenerateError, match="no batches"):
        linear_grams(module, params, [])
    with pytest.raises(DegenerateError, match="A state dict is a copy"):
        linear_grams(module, load(module), [torch.eye(3)])
    with pytest.raises(NonFiniteError, match="'weight'"):
        linear_grams(module, params, [torch.full((1, 3), float("nan"))])


# the rule


def test_regmean_of_full_matrices_minimises_the_outputs_distance():
    models = [torch.randn(2, 3) for _ in range(3)]
    data = [torch.randn(30, 3) for _ in models]
    merged = regmean(torch.stack(models), [gram(x) for x in data], off_diagonal=1.0, ridge=0.0).double()

    def distance(w: torch.Tensor) -> float:
        return float(sum(((x.double() @ (w - m.double()).T) ** 2).sum() for m, x in zip(models, data, strict=True)))

    best = distance(merged)
    for _ in range(20):
        assert distance(merged + 0.01 * torch.randn(2, 3).double()) > best


def test_regmean_is_linear_and_keeps_what_all_agree_on():
    base = torch.randn(2, 3)
    deltas = torch.randn(3, 2, 3)
    grams = [gram(torch.randn(9, 3)) for _ in range(3)]
    assert torch.allclose(regmean(base + deltas, grams), base + regmean(deltas, grams), atol=1e-5)
    same = deltas[:1].expand(3, 2, 3)
    assert torch.allclose(regmean(same, grams), deltas[0], atol=1e-5)


def test_inputs_that_are_always_zero_get_the_mean_and_without_a_ridge_an_error():
    stack = torch.randn(2, 2, 3)
    dead = [torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.diag(torch.tensor([3.0, 1.0, 0.0]))]
    assert torch.allclose(regmean(stack, dead)[:, 2], stack.mean(0)[:, 2], atol=1e-4)
    with pytest.raises(DegenerateError, match="singular"):
        regmean(stack, dead, ridge=0.0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gram": [torch.eye(3)]}, RangeError),
        ({"gram": [torch.eye(4)] * 2}, MismatchError),
        ({"gram": [torch.eye(3)] * 2, "off_diagonal": 2.0}, RangeError),
        ({"gram": [torch.eye(3)] * 2, "ridge": -1.0}, RangeError),
    ],
)
def test_bad_statistics_are_refused(options, error):
    with pytest.raises(error):
        regmean(torch.randn(2, 2, 3), **options)


# AdaMerging


def logits(params, x, task):
    return x @ params["w"] + params["b"]


def setting():
    torch.manual_seed(0)
    base = {"w": torch.zeros(4, 3), "b": torch.zeros(3)}
    vectors = [TaskVector({"w": torch.randn(4, 3), "b": torch.randn(3)}) for _ in range(2)]
    data = {"t": lambda: iter([torch.randn(32, 4)]), "u": lambda: iter([torch.randn(8, 4), torch.randn(8, 4)])}
    return base, vectors, data


def entropy(params) -> float:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    p = logits(params, x, "t").softmax(1)
    return float(-(p * p.log()).sum(1).mean())


@pytest.mark.parametrize("layerwise", [True, False])
def test_adamerging_lowers_the_entropy_and_keeps_its_coefficients_in_range(layerwise):
    base, vectors, data = setting()
    told: list[int] = []
    merged, scales = adamerging(
        logits, base, vectors, data, layerwise=layerwise, steps=40, lr=0.01, progress=lambda: told.append(1)
    )
    start = sum(vectors).apply(base, 0.3)
    assert entropy(merged) < entropy(start)
    assert all(0 <= s <= 1 for own in scales for s in own.values())
    assert len({*scales[0].values()}) == (2 if layerwise else 1)
    assert len(told) == 40
    expected = base["w"] + sum(s["w"] * v["w"] for s, v in zip(scales, vectors, strict=True))
    assert torch.allclose(merged["w"], expected, atol=1e-5)
    assert not merged["w"].requires_grad


def test_adamerging_says_what_is_missing():
    base, vectors, data = setting()
    for bad in (([], data), (vectors, {}), (vectors, {"t": lambda: iter([])})):
        with pytest.raises(DegenerateError):
            adamerging(logits, base, *bad, steps=1)
    with pytest.raises(DegenerateError, match="one class"):
        adamerging(lambda p, x, t: logits(p, x, t)[:, :1], base, vectors, data, steps=1)
    with pytest.raises(NonFiniteError):
        adamerging(lambda p, x, t: logits(p, x, t) * float("nan"), base, vectors, data, steps=1)
    with pytest.raises(RangeError):
        adamerging(logits, base, vectors, data, steps=0)
    with pytest.raises(MismatchError):
        adamerging(logits, base, [vectors[0], vectors[1].select("w")], data, steps=1)


# surgery


def test_surgery_starts_as_nothing_and_brings_features_back():
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    turn = torch.eye(6) + 0.3 * torch.randn(6, 6)
    adapter = surgery(lambda x: x @ turn, lambda x: x, lambda: iter([x]), rank=12, steps=400, lr=0.02)
    before, after = (x @ turn - x).abs().mean(), (repaired(x @ turn, adapter) - x).abs().mean()
    assert after < before / 2
    nothing = surgery(lambda x: x, lambda x: x, lambda: iter([x]), rank=2, steps=1)
    assert torch.allclose(repaired(x, nothing), x, atol=1e-2)
    with pytest.raises(MismatchError, match="width 6"):
        repaired(torch.zeros(1, 5), adapter)
    with pytest.raises(DegenerateError, match="yields nothing"):
        surgery(lambda x: x, lambda x: x, lambda: iter([]), steps=1)
    with pytest.raises(MismatchError, match=r"\(n, d\) for both"):
        surgery(lambda x: x, lambda x: x[:, :2], lambda: iter([x]), steps=1)
    with pytest.raises(RangeError):
        surgery(lambda x: x, lambda x: x, lambda: iter([x]), rank=0)
    assert isinstance(adapter, Adapter)


def test_statistics_of_nothing_and_of_nan_are_refused():
    layer = torch.nn.Linear(2, 1).eval()
    with pytest.raises(DegenerateError, match="every batch is empty"):
        linear_grams(layer, dict(layer.named_parameters()), [torch.empty(0, 2)])
    nan = torch.full((3, 4), float("nan"))
    with pytest.raises(NonFiniteError, match="features must be finite"):
        surgery(lambda _: nan, lambda _: nan, lambda: iter([nan]), rank=1, steps=1)
    stack, gram = torch.ones(2, 1, 2), torch.eye(2)
    with pytest.raises(NonFiniteError, match="Gram matrix"):
        regmean(stack, [gram, gram * float("nan")])
