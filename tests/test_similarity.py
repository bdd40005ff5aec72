"""How alike vectors are, against the same computed plainly on whole tensors."""

import math

import pytest
import torch

from taskvec import TaskVector, merge
from taskvec.errors import DegenerateError, MismatchError, NonFiniteError
from taskvec.merges import weighted
from taskvec.metrics import by_layer, coefficients, cosine_matrix, projection, sign_agreement, spectrum, support_overlap
from taskvec.sparsify import topk


def vector(seed: int, zeros: float = 0.0) -> TaskVector:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "blocks.0.w": torch.randn(60, 40, generator=g),
        "blocks.1.w": torch.randn(40, generator=g),
        "out": torch.randn(()),
    }
    return TaskVector({n: t * (torch.rand(t.shape, generator=g) >= zeros) for n, t in tensors.items()})


def flat(v: TaskVector) -> torch.Tensor:
    return torch.cat([v[name].flatten() for name in v]).double()


def test_cosine_matrix_is_that_of_the_pairs():
    vectors = [vector(seed) for seed in range(3)]
    found = cosine_matrix(vectors)
    for i, left in enumerate(vectors):
        for j, right in enumerate(vectors):
            assert math.isclose(found[i, j], left.cosine(right), rel_tol=1e-12)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [1, 1, 1]
    with pytest.raises(DegenerateError, match="vector 1 must have a direction"):
        cosine_matrix([vectors[0], 0 * vectors[1]])
    with pytest.raises(DegenerateError, match="no vectors"):
        cosine_matrix([])


def test_signs_are_compared_where_neither_is_zero():
    vectors = [vector(seed, zeros=0.3) for seed in range(3)]
    found = sign_agreement(vectors)
    for i, left in enumerate(map(flat, vectors)):
        for j, right in enumerate(map(flat, vectors)):
            both = (left != 0) & (right != 0)
            assert found[i, j] == (left.sign() == right.sign())[both].double().mean()
    assert sign_agreement([vectors[0], -vectors[0]])[0, 1] == 0
    apart = [TaskVector({"w": torch.tensor(w)}) for w in ([1.0, 0.0], [0.0, 1.0])]
    assert sign_agreement(apart)[0, 1].isnan()


def test_supports_overlap_as_sets_do():
    vectors = [vector(seed).map(topk, density=0.2) for seed in range(3)]
    found = support_overlap(vectors)
    for i, left in enumerate(map(flat, vectors)):
        for j, right in enumerate(map(flat, vectors)):
            either = ((left != 0) | (right != 0)).sum()
            assert found[i, j] == ((left != 0) & (right != 0)).sum() / either.double()
    many = [TaskVector({"w": torch.randn(100_000, generator=torch.Generator().manual_seed(s))}) for s in (0, 1)]
    independent = support_overlap(v.map(topk, density=0.1) for v in many)[0, 1]
    assert independent == pytest.approx(0.1 / 1.9, rel=0.1)  # the docstring's random supports


def test_coefficients_are_those_of_least_squares():
    bank, others = [vector(seed) * (10.0**seed) for seed in range(4)], [vector(9), vector(10)]
    exact = merge(bank, weighted, weights=[2.0, -1.0, 0.0, 0.5])
    found = coefficients([exact, *others], bank)
    assert torch.allclose(found[0], torch.tensor([2.0, -1.0, 0.0, 0.5]).double(), atol=1e-5)
    matrix = torch.stack([flat(b) for b in bank], 1)
    for row, other in zip(found[1:], others, strict=True):
        assert torch.allclose(row, torch.linalg.lstsq(matrix, flat(other)).solution, rtol=1e-8)
    assert torch.isclose(projection(others[0], bank[1]), others[0].dot(bank[1]) / bank[1].norm() ** 2)


def test_a_bank_that_says_the_same_twice_gives_the_shortest_answer():
    v = vector(0)
    assert torch.allclose(coefficients([v], [v, v]), torch.tensor([[0.5, 0.5]]).double())


def test_banks_without_directions_are_refused():
    v = vector(0)
    with pytest.raises(DegenerateError, match="bank must not be empty"):
        coefficients([v], [])
    with pytest.raises(DegenerateError, match="bank vector 1 must have a direction"):
        coefficients([v], [v, 0 * v])
    with pytest.raises(DegenerateError, match="no vectors to express"):
        coefficients([], [v])
    with pytest.raises(MismatchError):
        coefficients([v], [v.select("out")])


def test_spectra_are_those_of_the_matrices():
    v = TaskVector({"conv": torch.randn(4, 3, 2, 2), "w": torch.randn(5, 2), "b": torch.randn(5)})
    found = spectrum(v)
    assert list(found) == ["conv", "w"]
    assert torch.allclose(found["w"] ** 2, torch.linalg.eigvalsh(v["w"].double().T @ v["w"].double()).flip(0))
    assert torch.allclose(found["conv"], torch.linalg.svdvals(v["conv"].double().reshape(4, 12)))
    assert torch.isclose(found["conv"].square().sum(), v["conv"].double().square().sum())
    with pytest.raises(NonFiniteError, match="'w'"):
        spectrum(TaskVector({"w": torch.full((2, 2), math.nan)}))
    assert spectrum(v.select("b")) == {}


def test_a_measure_by_layer_is_that_of_the_parts():
    vectors = [vector(seed) for seed in range(2)]
    found = by_layer(cosine_matrix, vectors)
    assert list(found) == ["blocks.0", "blocks.1", "out"]
    assert torch.equal(found["blocks.0"], cosine_matrix([v.select("blocks.0.*") for v in vectors]))
    whole = by_layer(cosine_matrix, vectors, layer=lambda name: "all")
    assert torch.equal(whole["all"], cosine_matrix(vectors))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("measure", [cosine_matrix, sign_agreement, support_overlap, lambda vs: coefficients(vs, vs)])
def test_a_statistic_over_nan_or_inf_names_the_tensor(measure, value):
    broken = TaskVector({**vector(0).tensors, "out": torch.tensor(value)})
    with pytest.raises(NonFiniteError, match="'out'"):
        measure([vector(1), broken])


def test_every_measure_is_its_naive_loop():
    vectors = [vector(seed, zeros=0.2) for seed in range(3)]
    rows = [[float(x) for x in flat(v)] for v in vectors]
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            dot = sum(x * y for x, y in zip(left, right, strict=True))
            norms = [math.sqrt(sum(x * x for x in row)) for row in (left, right)]
            both = [(x, y) for x, y in zip(left, right, strict=True) if x and y]
            either = [(x, y) for x, y in zip(left, right, strict=True) if x or y]
            assert cosine_matrix(vectors)[i, j] == pytest.approx(dot / norms[0] / norms[1])
            assert sign_agreement(vectors)[i, j] == pytest.approx(sum((x > 0) == (y > 0) for x, y in both) / len(both))
            assert support_overlap(vectors)[i, j] == pytest.approx(len(both) / len(either))
            assert projection(vectors[i], vectors[j]) == pytest.approx(dot / norms[1] ** 2)
