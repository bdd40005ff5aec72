"""One vector for each task, coefficients from norms and layers, and a vector moved to another base."""

import json
from pathlib import Path

import pytest
import torch
from test_values import flat, rows_of, sign, vectors

from taskvec import BackdoorVector, TaskVector, load, merge, per_task, rebase, save, schedules
from taskvec.errors import DegenerateError, MismatchError, MissingError, NonFiniteError, RangeError
from taskvec.merges import total, weighted

NAMES = ("a", "b", "c")


def given(n: int = 4) -> list[TaskVector]:
    return [TaskVector(tensors) for tensors in vectors(n)]


def entries(vector: TaskVector, names: tuple[str, ...] = NAMES) -> list[float]:
    return [x for name in names for x in flat(rows_of(vector[name]))]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_emr_is_its_naive_loop(scope):
    together = given()
    found = per_task.emr(together, scope=scope)
    for names in [NAMES] if scope == "global" else [(name,) for name in NAMES]:
        values = [entries(v, names) for v in together]
        for own, result in zip(values, found, strict=True):
            shared = []
            for x, places in zip(own, zip(*values, strict=True), strict=True):
                elected = sign(sum(places))
                shared.append(elected * max(y * elected for y in places) if x * elected > 0 else 0)
            factor = sum(map(abs, own)) / sum(map(abs, shared))
            assert entries(result, names) == pytest.approx([factor * x for x in shared], rel=1e-12)


def test_tall_masks_keep_of_the_sum_what_a_task_needs():
    together = given()
    summed = entries(merge(together, total))
    for vector, result in zip(together, per_task.tall_masks(together, [0.2, 0.4, 0.6, 0.8]), strict=True):
        threshold = 0.2 * (1 + together.index(vector))
        wanted = [m if abs(x) > threshold * abs(m - x) else 0 for x, m in zip(entries(vector), summed, strict=True)]
        assert entries(result) == wanted
        assert 0 < sum(x != 0 for x in wanted) < len(wanted)


def test_tsv_c_keeps_the_leading_directions_of_matrices_and_all_else():
    random = torch.Generator().manual_seed(0)
    together = [TaskVector({"m": torch.randn(9, 7, generator=random), "b": torch.ones(3)}) for _ in range(3)]
    for vector, result in zip(together, per_task.tsv_c(together), strict=True):
        u, s, v = torch.linalg.svd(vector["m"], full_matrices=False)
        torch.testing.assert_close(result["m"], (u[:, :2] * s[:2]) @ v[:2])
        assert torch.equal(result["b"], vector["b"])
    assert torch.linalg.matrix_rank(per_task.tsv_c(together, share=0.5)[0]["m"]) == 3
    with pytest.raises(RangeError, match="share must be the fraction"):
        per_task.tsv_c(together, share=20)


@pytest.mark.parametrize("function", [per_task.emr, per_task.tall_masks, per_task.tsv_c])
def test_of_no_vectors_nothing_is_made(function):
    with pytest.raises(DegenerateError, match="give at least one"):
        function([])


@pytest.mark.parametrize("function", [per_task.emr, per_task.tall_masks, per_task.tsv_c])
def test_from_disk_and_in_memory_the_bits_are_the_same(function, tmp_path):
    for i, vector in enumerate(given()):
        save(vector, tmp_path / f"{i}.safetensors")
    stored = [load(tmp_path / f"{i}.safetensors") for i in range(4)]
    for lazy, eager in zip(function(stored), function(given()), strict=True):
        assert all(torch.equal(lazy[name], eager[name]) for name in NAMES)


def test_emr_of_rows_is_refused():
    with pytest.raises(RangeError, match="'global' or 'tensor'"):
        per_task.emr(given(), scope="row")


# coefficients


def test_metagpt_weighs_by_squared_norms():
    together = given(3)
    squares = [sum(x * x for x in entries(v)) for v in together]
    weights = schedules.metagpt(together)
    assert weights == pytest.approx([s / sum(squares) for s in squares])
    assert sum(weights) == pytest.approx(1)
    assert len(set(weights)) == 3
    merge(together, weighted, weights=weights)
    with pytest.raises(DegenerateError, match="all vectors are zero"):
        schedules.metagpt([TaskVector({"w": torch.zeros(2)})])


def test_lines_grow_with_the_layer_and_are_alpha_elsewhere():
    names = ["embed.weight", "blocks.0.w", "blocks.1.w", "blocks.4.experts.7.w", "head"]
    assert schedules.lines(names, alpha=0.5, beta=2.0) == {
        "embed.weight": 0.5,
        "blocks.0.w": 0.5,
        "blocks.1.w": 1.0,
        "blocks.4.experts.7.w": 2.5,
        "head": 0.5,
    }
    vector = TaskVector({"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1)})
    applied = vector.apply(dict.fromkeys(vector, torch.zeros(1)), scale=schedules.lines(vector, 0.25, 0.5))
    assert [float(x) for x in applied.values()] == [0.25, 0.75]
    assert schedules.lines(["layers.0.w"], 0.25, 0.5) == {"layers.0.w": 0.25}
    with pytest.raises(MissingError, match="number of a layer"):
        schedules.lines(["weight", "bias"], 0.1, 0.2)


def test_the_first_coefficient_of_lines_is_the_authors():
    together = given(3)
    merged = merge(together, weighted, weights=[0.5, 0.2, 0.1])
    expected = float(sum(together).norm()) / 3 / float(merged.norm())
    assert schedules.lines_alpha(together, merged) == pytest.approx(expected)
    with pytest.raises(DegenerateError, match="nothing to scale"):
        schedules.lines_alpha(together, merged * 0)


# another base


def bases() -> tuple[dict[str, torch.Tensor], ...]:
    random = torch.Generator().manual_seed(1)
    return tuple(
        {"a": torch.randn(4, 3, generator=random), "b": torch.randn(5, generator=random), "n": torch.tensor(3)}
        for _ in range(3)
    )


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_an_orthogonal_shift_takes_out_the_projection(scope, beta):
    old, new, tuned = bases()
    vector = TaskVector.between(old, tuned)
    moved = rebase.orthogonal_shift(vector, old, new, beta, scope=scope)
    for names in [("a", "b")] if scope == "global" else [("a",), ("b",)]:
        x = torch.cat([(tuned[n] - old[n]).flatten() for n in names]).double()
        d = torch.cat([(new[n] - old[n]).flatten() for n in names]).double()
        wanted = x - beta * (x @ d) / (d @ d) * d
        found = torch.cat([moved[n].flatten() for n in names]).double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_moved_vector_is_of_the_new_base():
    old, new, tuned = bases()
    moved = rebase.orthogonal_shift(TaskVector.between(old, tuned), old, new)
    assert moved.meta == TaskVector.between(new, tuned).meta
    with pytest.raises(MismatchError, match="different bases"):
        moved + TaskVector.between(old, tuned)
    backdoor = BackdoorVector.between(old, tuned)
    assert type(rebase.orthogonal_shift(backdoor, old, new)) is BackdoorVector
    with pytest.raises(MismatchError, match="different bases"):
        rebase.orthogonal_shift(TaskVector.between(new, tuned), old, new)


def test_between_equal_bases_a_vector_stays_as_it_is():
    old, _, tuned = bases()
    vector = TaskVector.between(old, tuned)
    same = {name: x.clone() for name, x in old.items()}
    assert rebase.orthogonal_shift(vector, old, same).allclose(vector, rtol=0, atol=0)
    with pytest.raises(RangeError, match="'tensor' or 'global'"):
        rebase.orthogonal_shift(vector, old, same, scope="row")


def test_descending_keeps_what_lowers_the_loss():
    old, new, tuned = bases()
    vector = TaskVector.between(old, tuned)
    gradient = {name: x - 0.3 for name, x in TaskVector.between(tuned, new).items()}
    gradient["a"][0, 0] = 0.0
    for flip in (False, True):
        moved = rebase.descending(vector, gradient, new, flip=flip)
        for name, x in vector.items():
            for one, g, kept in zip(x.flatten(), gradient[name].flatten(), moved[name].flatten(), strict=True):
                down = -1.0 if g > 0 else 1.0 if g < 0 else 0.0
                agrees = float(one) * down > 0
                assert kept == (abs(one) * down if flip else one if agrees else 0.0)
        assert moved.meta == TaskVector.between(new, tuned).meta
    slope = sum(float((gradient[name] * x).sum()) for name, x in rebase.descending(vector, gradient, new).items())
    assert slope < 0


def test_descending_needs_the_whole_gradient():
    old, new, tuned = bases()
    vector = TaskVector.between(old, tuned)
    with pytest.raises(MismatchError, match="b"):
        rebase.descending(vector, {"a": torch.ones(4, 3)}, new)
    with pytest.raises(NonFiniteError, match="'b'"):
        rebase.descending(vector, {"a": torch.ones(4, 3), "b": torch.full((5,), torch.nan)}, new)


def test_moves_agree_with_the_peers_code():
    known = json.loads((Path(__file__).parent / "golden" / "rebase.json").read_text())
    given = {
        key: {name: torch.tensor(x) for name, x in found.items()}
        for key, found in known.items()
        if isinstance(found, dict)
    }
    vector, features = TaskVector(given["vector"]), given["features"]
    new = {name: torch.zeros_like(x) for name, x in vector.items()}
    for case, flip in (("gradfix normal", False), ("gradfix force", True)):
        moved = rebase.descending(vector, given["gradient"], new, flip=flip)
        assert all(torch.equal(moved[name], given[case][name]) for name in vector)
    into, out = (rebase.alignment(features[f"source {side}"], features[f"target {side}"]) for side in ("in", "out"))
    moved = rebase.transport(vector, {"w": into}, {"w": out, "b": out}, {"w": torch.zeros(5, 2), "b": torch.zeros(5)})
    for name in vector:
        torch.testing.assert_close(moved[name], given["theseus"][name], rtol=1e-5, atol=1e-6)


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double())[0]


def test_an_alignment_finds_the_rotation_between_features():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    turn = rotation(5, 1)
    torch.testing.assert_close(rebase.alignment(features, features @ turn), turn)
    narrow = rebase.alignment(features, features @ turn[:, :3])
    assert narrow.shape == (5, 3)
    torch.testing.assert_close(narrow.T @ narrow, torch.eye(3).double())


def test_transport_between_turned_networks_is_exact():
    """A two-layer network and the same with its hidden features turned: the vector must turn with them."""
    random = torch.Generator().manual_seed(2)
    old, tuned = (
        {name: torch.randn(shape, generator=random).double() for name, shape in {"v": (4, 3), "b": (4,)}.items()}
        for _ in range(2)
    )
    turn, before = rotation(4, 3), rotation(3, 4)
    new, wanted = ({"v": turn.T @ m["v"] @ before, "b": m["b"] @ turn} for m in (old, tuned))
    moved = rebase.transport(TaskVector.between(old, tuned), {"v": before}, {"v": turn, "b": turn}, new)
    for name, x in moved.apply(new).items():
        torch.testing.assert_close(x, wanted[name])
    assert moved.meta == TaskVector.between(new, wanted).meta


def test_maps_that_do_not_fit_are_refused():
    vector, one = TaskVector({"w": torch.ones(2, 3), "b": torch.ones(2)}), torch.ones(2, 2)
    new = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    with pytest.raises(MismatchError, match="'c'"):
        rebase.transport(vector, {}, {"c": one}, new)
    with pytest.raises(MismatchError, match="'w'"):
        rebase.transport(vector, {"w": torch.eye(3)}, {"b": one}, new)
    with pytest.raises(MismatchError, match="'w' must be a bias"):
        rebase.transport(vector, {}, {"w": one}, new)
    with pytest.raises(MismatchError, match=r"lead from \(2, 2\)"):
        rebase.transport(vector, {"w": one}, {"w": one}, new)
    with pytest.raises(MismatchError, match="same samples"):
        rebase.alignment(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(NonFiniteError):
        rebase.alignment(torch.full((3, 2), torch.inf), torch.ones(3, 2))
