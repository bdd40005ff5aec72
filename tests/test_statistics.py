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
    with pytest.raises(OptionError, match=r"a Sequential in training mode; call .eval\(\) first"):
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
    with pytest.raises(DegenerateError, match="no rows for 'weight'"):
        linear_grams(module, params, [torch.zeros(0, 3)])
    some = linear_grams(module, params, [torch.zeros(0, 3), torch.eye(3)]).matrices["weight"]
    assert torch.equal(some, torch.eye(3).double() / 3)  # an empty batch does not count
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
    with pytest.raises(DegenerateError, match="1 class"):
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
    with pytest.raises(DegenerateError, match="a pass without any"):
        surgery(lambda x: x, lambda x: x, lambda: iter([]), steps=1)
    with pytest.raises(MismatchError, match=r"\(n, d\) in both"):
        surgery(lambda x: x, lambda x: x[:, :2], lambda: iter([x]), steps=1)
    with pytest.raises(RangeError):
        surgery(lambda x: x, lambda x: x, lambda: iter([x]), rank=0)
    assert isinstance(adapter, Adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_surgery_on_features_that_are_not_finite_is_refused(value):
    def broken(x):
        return x * value

    for merged, individual, who in ((broken, abs, "merged model"), (abs, broken, "own model")):
        with pytest.raises(NonFiniteError, match=who):
            surgery(merged, individual, lambda: iter([torch.ones(3, 2)]), steps=1)


# values


@pytest.mark.parametrize("layerwise", [True, False])
def test_adamerging_is_adam_on_the_summed_mean_entropies(layerwise):
    base, vectors, _ = setting()
    data = {task: torch.randn(n, 4) for task, n in (("t", 32), ("u", 5))}
    loaders = {task: lambda x=x: iter([x]) for task, x in data.items()}
    _, found = adamerging(logits, base, vectors, loaders, layerwise=layerwise, steps=7, lr=0.1, clamp=None)

    raw = torch.full((2, 2 if layerwise else 1), 0.3, dtype=torch.float64, requires_grad=True)
    first, second = torch.zeros_like(raw), torch.zeros_like(raw)
    for step in range(1, 8):
        scales = raw.expand(2, 2)
        w, b = (
            base[n] + sum(scales[i, j] * vectors[i][n].double() for i in range(2)) for j, n in enumerate(("w", "b"))
        )
        loss = 0.0
        for x in data.values():
            p = (x.double() @ w + b).softmax(1)
            loss = loss - (p * p.log()).sum() / len(x)
        (gradient,) = torch.autograd.grad(loss, [raw])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = 0.1 * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        raw = (raw - update).detach().requires_grad_()
    expected = raw.detach().expand(2, 2)
    assert [[own["w"], own["b"]] for own in found] == [pytest.approx(row, abs=1e-4) for row in expected.tolist()]


def test_adamerging_begins_at_0_3_and_clamps_where_told():
    base, vectors, data = setting()
    assert len({*adamerging(logits, base, vectors, data, steps=5, lr=0.1)[1][0].values()}) == 2  # one per tensor
    still = adamerging(logits, base, vectors, data, steps=1, lr=1e-9)[1]
    assert [*still[0].values(), *still[1].values()] == pytest.approx([0.3] * 4)
    for clamp, low, high in (((0.0, 1.0), 0.0, 1.0), ((0.25, 0.35), 0.25, 0.35), (None, -9, 9)):
        scales = adamerging(logits, base, vectors, data, steps=30, lr=0.5, clamp=clamp)[1]
        values = [s for own in scales for s in own.values()]
        assert all(low - 1e-6 <= s <= high + 1e-6 for s in values)
        assert clamp is not None or max(values) > 1
    free, default = (
        adamerging(logits, base, vectors, data, steps=30, lr=0.5, **how)[1] for how in ({"clamp": None}, {})
    )
    assert max(free[0].values()) > 1 >= max(default[0].values())


def test_surgery_is_adam_on_the_mean_absolute_distance_from_a_kaiming_start():
    torch.manual_seed(0)
    x, aim = torch.randn(32, 6), torch.randn(32, 6)
    start = surgery(lambda _: x, lambda _: aim, lambda: iter([x]), steps=1, lr=1e-12)
    assert start.down.shape == (16, 6)
    assert not bool((start.up.abs() > 1e-11).any())
    assert 0.9 < float(start.down.abs().max()) <= 1  # uniform within sqrt(6 / width)
    again, other = (surgery(lambda _: x, lambda _: aim, lambda: iter([x]), steps=1, seed=seed).down for seed in (0, 1))
    assert torch.allclose(again, start.down, atol=2e-3)
    assert not torch.allclose(other, start.down, atol=2e-3)
    found = surgery(lambda _: x, lambda _: aim, lambda: iter([x]), steps=3, lr=0.01)
    down, up = (t.detach().clone().requires_grad_() for t in start)
    optimizer = torch.optim.Adam([down, up], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        repaired_by_hand = x - torch.relu(x @ down.T) @ up.T
        ((repaired_by_hand - aim).abs().sum() / x.numel()).backward()
        optimizer.step()
    assert torch.allclose(found.down, down, atol=1e-5)
    assert torch.allclose(found.up, up, atol=1e-5)
    assert torch.allclose(repaired(x, found), (x - torch.relu(x @ down.T) @ up.T).detach(), atol=1e-4)


def test_grams_are_means_over_every_row_of_every_batch():
    module = nn.Linear(2, 1).eval()
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])]
    found = linear_grams(module, dict(module.named_parameters()), batches).matrices["weight"]
    assert found.tolist() == [[(1 + 9) / 4, 2 / 4], [2 / 4, (4 + 1) / 4]]
