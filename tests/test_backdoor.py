"""Backdoor vectors, attacks and defences as vector algebra."""

import pytest
import torch
from small import bv, lazy, same, weights

from taskvec import BackdoorVector, TaskVector, merge
from taskvec.attacks import amplify, sparse_backdoor
from taskvec.attacks.triggers import Patch, blend, random_patch, solid_patch, stamp
from taskvec.errors import DegenerateError, MismatchError, RangeError
from taskvec.merges import mean

# the vector


def test_inject_and_remove_undo_each_other():
    clean, backdoored = weights(0), weights(1)
    vector = BackdoorVector.between(clean=clean, backdoored=backdoored)
    assert all(torch.allclose(vector.inject(clean)[n], backdoored[n], atol=1e-6) for n in clean)
    assert all(torch.allclose(vector.remove(backdoored)[n], clean[n], atol=1e-6) for n in clean)
    assert same(vector.remove(backdoored, 0.3), vector.inject(backdoored, -0.3))


def test_equal_models_are_refused_loudly():
    with pytest.raises(DegenerateError, match="no backdoor in this checkpoint"):
        BackdoorVector.between(clean=weights(0), backdoored=weights(0))
    with pytest.raises(DegenerateError):
        BackdoorVector.between(clean=lazy(weights(0)), backdoored=lazy(weights(0)))


def test_clean_twins_may_differ_but_pretrained_models_may_not():
    one = BackdoorVector.between(clean=weights(0), backdoored=weights(1))
    other = BackdoorVector.between(clean=weights(2), backdoored=weights(3))
    assert isinstance(one + other, BackdoorVector)
    known = [BackdoorVector.between(clean=weights(0), backdoored=weights(1), pretrained=weights(p)) for p in (7, 8)]
    with pytest.raises(MismatchError, match="different bases"):
        known[0] + known[1]
    tuned = TaskVector.between(weights(7), weights(1))
    assert type(known[0] + tuned) is TaskVector
    assert type(one + tuned) is TaskVector  # what both know agrees: names, shapes and dtypes
    with pytest.raises(MismatchError, match="different bases"):
        known[1] + tuned


def test_algebra_and_merge_keep_the_type_that_all_share():
    vector = bv(0)
    assert all(type(v) is BackdoorVector for v in (-vector, 2 * vector, vector / 2, vector.select("a"), sum([vector])))
    assert type(merge([vector, bv(1)], mean)) is BackdoorVector
    assert type(merge([vector, TaskVector(dict(vector))], mean)) is TaskVector


# attacks


def test_sparse_backdoor_keeps_what_all_agree_on_and_restores_the_norm():
    bvs = [bv(i) for i in range(3)]
    sparse = sparse_backdoor(bvs)
    agree = torch.stack([v["a"].sign() for v in bvs]).sum(0).abs() == 3
    assert torch.equal(sparse["a"] != 0, agree)
    assert float(sparse.norm()) == pytest.approx(float(sum(v.norm() for v in bvs)) / 3)
    plain = sparse_backdoor(bvs, match_norm=False)
    assert torch.allclose(plain["a"], sum(v["a"] for v in bvs) / 3 * agree)
    assert sparse.cosine(plain) == pytest.approx(1)


@pytest.mark.parametrize(("agree", "votes"), [(1.0, 5), (0.8, 4), (0.6, 3), (0.7, 4)])
def test_a_fraction_may_be_enough(agree, votes):
    bvs = [bv(i) for i in range(5)]
    kept = sparse_backdoor(bvs, agree=agree)["a"] != 0
    signs = torch.stack([v["a"].sign() for v in bvs])
    elected = torch.stack([v["a"] for v in bvs]).sum(0).sign()
    assert torch.equal(kept, (signs == elected).sum(0) >= votes)


def test_reductions_density_and_single_vectors():
    bvs = [bv(i) for i in range(2)]
    total, average = (sparse_backdoor(bvs, reduce=r, match_norm=False) for r in ("sum", "mean"))
    assert total.allclose(average * 2)
    largest = sparse_backdoor(bvs, reduce="largest", match_norm=False)["a"]
    assert largest.abs().ge(average["a"].abs()).all()
    few = sparse_backdoor(bvs, density=0.1)
    assert sum(int(t.count_nonzero()) for t in few.values()) == round(0.1 * 2040)
    assert sparse_backdoor(bvs[:1]).allclose(bvs[0])


def test_sparse_backdoor_says_when_nothing_is_left():
    with pytest.raises(DegenerateError, match="lower agree="):
        sparse_backdoor([bv(0), -bv(0)])
    with pytest.raises(DegenerateError, match="no backdoor vectors"):
        sparse_backdoor([])
    with pytest.raises(RangeError, match="agree"):
        sparse_backdoor([bv(0)], agree=0)
    with pytest.raises(RangeError, match="reduce"):
        sparse_backdoor([bv(0)], reduce="median")  # type: ignore[arg-type]


def test_amplify_scales_and_keeps_the_bound_exactly():
    vector, clean = bv(0), TaskVector(bv(1))
    assert amplify(vector, 4).allclose(vector * 4)
    bounded = amplify(vector, 4, max_norm_ratio=1.5, clean=clean)
    assert float((clean + bounded).norm() / clean.norm()) == pytest.approx(1.5)
    assert amplify(vector * 1e-3, 4, max_norm_ratio=1.5, clean=clean).allclose(vector * 4e-3)
    with pytest.raises(RangeError, match="use clean="):
        amplify(vector, 4, max_norm_ratio=1.5)
    with pytest.raises(RangeError, match="at least 1"):
        amplify(vector, 4, max_norm_ratio=0.5, clean=clean)
    with pytest.raises(DegenerateError, match="zero"):
        amplify(vector * 0, 4, max_norm_ratio=1.5, clean=clean)


# triggers


@pytest.mark.parametrize(
    ("place", "first"),
    [
        ("top-left", (0, 0)),
        ("top-right", (0, 5)),
        ("bottom-left", (5, 0)),
        ("bottom-right", (5, 5)),
        ("center", (2, 2)),
        ((1, 4), (1, 4)),
    ],
)
def test_a_patch_lies_where_it_is_put_and_nowhere_else(place, first):
    patch = solid_patch(3, (2, 8, 8), place=place, value=(0.25, 1.0))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[first[0] : first[0] + 3, first[1] : first[1] + 3] = True
    assert torch.equal(patch.mask, expected)
    images = torch.rand(4, 2, 8, 8)
    stamped = stamp(images, patch)
    assert torch.equal(stamped[:, :, ~expected], images[:, :, ~expected])
    assert stamped[:, 0, expected].eq(0.25).all()
    assert stamped[:, 1, expected].eq(1).all()


def test_a_black_pixel_of_a_patch_is_opaque():
    assert stamp(torch.ones(1, 1, 2, 2), solid_patch(2, (1, 2, 2), value=0.0)).eq(0).all()


def test_random_patches_depend_on_the_seed_alone():
    one, again, other = (random_patch(5, (1, 28, 28), seed=s) for s in (0, 0, 1))
    assert torch.equal(one.pattern, again.pattern)
    assert not torch.equal(one.pattern, other.pattern)
    values = one.pattern[:, one.mask].unique()
    assert values.tolist() == [0, 1]


def test_opacity_mixes_and_blend_covers_everything():
    images = torch.rand(3, 1, 4, 4)
    patch = solid_patch(2, (1, 4, 4))
    half = stamp(images, patch, opacity=0.5)
    assert torch.allclose(half[:, 0, patch.mask], images[:, 0, patch.mask] * 0.5 + 0.5)
    assert torch.equal(stamp(images, patch, opacity=0.0), images)
    assert torch.allclose(blend(images, torch.ones(1, 4, 4)), images * 0.8 + 0.2)


def test_other_pixel_ranges_and_half_precision():
    images = (torch.rand(2, 1, 4, 4) * 255).half()
    out = stamp(images, solid_patch(2, (1, 4, 4), value=255.0), pixel_range=(0, 255))
    assert out.dtype == torch.half
    assert out[:, :, 2:, 2:].eq(255).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solid_patch(9, (1, 8, 8)), "size must fit"),
        (lambda: solid_patch(0, (1, 8, 8)), "size must fit"),
        (lambda: solid_patch(3, (1, 8, 8), place=(6, 0)), "place must keep"),
        (lambda: solid_patch(3, (1, 8, 8), place="bottom"), "one of top-left"),  # type: ignore[arg-type]
        (lambda: solid_patch(3, (3, 8, 8), value=(1.0, 0.0)), "2 values for 3 channels"),
        (lambda: stamp(torch.randn(1, 1, 8, 8) * 3, solid_patch(3, (1, 8, 8))), "stamp before normalizing"),
        (lambda: stamp(torch.rand(1, 1, 8, 8), solid_patch(3, (1, 8, 8)), opacity=2), "opacity"),
    ],
)
def test_bad_triggers_are_refused(make, message):
    with pytest.raises(RangeError, match=message):
        make()


def test_a_patch_for_other_images_is_refused():
    with pytest.raises(MismatchError, match=r"\(1, 8, 8\)"):
        stamp(torch.rand(2, 1, 9, 9), solid_patch(3, (1, 8, 8)))
    with pytest.raises(MismatchError, match="mask"):
        stamp(torch.rand(2, 1, 8, 8), Patch(torch.rand(1, 8, 8), torch.ones(4, 4, dtype=torch.bool)))


# values and defaults


def test_a_sparse_backdoor_is_its_naive_loop():
    bvs = [BackdoorVector({"w": torch.tensor(w)}) for w in ([3.0, 1.0, -2.0, 0.5], [1.0, -1.0, -4.0, 0.1])]
    assert sparse_backdoor(bvs, match_norm=False)["w"].tolist() == pytest.approx([2.0, 0.0, -3.0, 0.3])
    norm = (14.25**0.5 + 18.01**0.5) / 2
    expected = [2.0, 0.0, -3.0, 0.3]
    factor = norm / sum(x * x for x in expected) ** 0.5
    assert sparse_backdoor(bvs)["w"].tolist() == pytest.approx([factor * x for x in expected])
    few = sparse_backdoor(bvs, density=0.25)["w"]  # sparsified first: the norm is restored in the end
    assert few.tolist() == pytest.approx([0.0, 0.0, -norm, 0.0])
    largest = sparse_backdoor(bvs, reduce="largest", match_norm=False)["w"]
    assert largest.tolist() == pytest.approx([3.0, 0.0, -4.0, 0.5])


def test_stamping_is_its_formula_and_the_defaults_are_those_that_are_written():
    images = torch.rand(3, 2, 6, 6)
    patch = random_patch(3, (2, 6, 6), seed=0, values=(0.25, 0.75))
    found = stamp(images, patch, opacity=0.3)
    for n in range(3):
        for c in range(2):
            for i in range(6):
                for j in range(6):
                    x, p = float(images[n, c, i, j]), float(patch.pattern[c, i, j])
                    expected = 0.7 * x + 0.3 * p if i >= 3 and j >= 3 else x  # the bottom-right corner
                    assert float(found[n, c, i, j]) == pytest.approx(expected)
    assert set(patch.pattern[:, patch.mask].flatten().tolist()) == {0.25, 0.75}
    many = random_patch(100, (1, 100, 100), seed=0).pattern
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)
    assert solid_patch(2, (1, 4, 4)).pattern[0, 2:, 2:].eq(1).all()
