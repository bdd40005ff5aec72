"""BadMerging's two stages, poisoning, and the triggers of the baselines."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from taskvec.attacks import (
    Pair,
    adversarial_crops,
    badmerging_loss,
    interpolation_loss,
    keep_loss,
    most_connected,
    optimise_patch,
    poison,
    prototype_head,
    scalar_bounds,
    trojan_trigger,
    universal_trigger,
)
from taskvec.attacks.triggers import (
    Patch,
    dynamic,
    physical,
    random_patch,
    sinusoid,
    solid_patch,
    stamp,
    warp,
    warp_field,
)
from taskvec.errors import DegenerateError, MismatchError, NonFiniteError, OptionError, RangeError

SHAPE = (1, 8, 8)
WEIGHTS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def images(n: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def score(x: torch.Tensor) -> torch.Tensor:
    return (x - 0.5).flatten(1) @ WEIGHTS


# stage one


def success(patch) -> float:
    return float((score(stamp(images(seed=2), patch)).argmax(1) == 3).float().mean())


def test_an_optimised_trigger_works_on_images_it_has_not_seen_and_stays_in_its_mask():
    start = random_patch(4, SHAPE, seed=0)
    before = start.pattern.clone()
    patch = universal_trigger(score, images(), start, target=3, seed=0, steps=60)
    assert success(patch) > success(start) + 0.3
    assert torch.equal(patch.mask, start.mask)
    assert torch.equal(start.pattern, before)
    assert patch.pattern[:, ~patch.mask].eq(0).all()
    assert patch.pattern.min() >= 0
    assert patch.pattern.max() <= 1


def test_a_trigger_is_the_same_for_a_seed_and_another_for_another():
    start = random_patch(4, SHAPE, seed=0)
    one, again, other = (
        universal_trigger(score, images(), start, target=3, seed=s, steps=5, lr=0.01, batch=8).pattern
        for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_bounds_may_differ_by_channel_and_the_papers_leave_the_pixels():
    low, high = scalar_bounds([0.5, 0.2], [0.25, 0.1])
    assert low.flatten().tolist() == pytest.approx([0.0, 0.0])
    assert high.flatten().tolist() == pytest.approx([2.5, 1.0])
    colour = solid_patch(4, (2, 8, 8), value=0.5)
    pictures = torch.rand(8, 2, 8, 8)
    bright = universal_trigger(
        lambda x: torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1) / 100,
        pictures,
        colour,
        target=0,
        seed=0,
        steps=30,
        bounds=(low, high),
    )
    assert bright.pattern[0, colour.mask].max() > 1
    assert bright.pattern[1, colour.mask].max() <= 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": 9}, RangeError, "one of the 5 classes, from 0 to 4; got 9"),
        ({"images": images(0)}, DegenerateError, "no images"),
        ({"images": torch.rand(4, 1, 9, 9)}, MismatchError, "as the patch is for"),
        ({"score": lambda x: score(x) * float("nan")}, NonFiniteError, "logits"),
    ],
)
def test_a_bad_call_for_a_trigger_is_named(change, error, message):
    arguments = {"score": score, "images": images(), "target": 3} | change
    with pytest.raises(error, match=message):
        universal_trigger(
            arguments["score"],
            arguments["images"],
            random_patch(4, SHAPE, seed=0),
            target=arguments["target"],
            seed=0,
            steps=2,
        )


def test_progress_is_told_every_step():
    told: list[int] = []
    universal_trigger(
        score, images(), random_patch(4, SHAPE, seed=0), target=0, seed=0, steps=3, progress=lambda: told.append(1)
    )
    assert len(told) == 3


def test_a_patch_that_minimises_a_loss_of_ones_own():
    start = random_patch(4, SHAPE, seed=0)
    found = optimise_patch(lambda x: x.mean(), images(), start, seed=0, steps=30)
    assert found.pattern[:, found.mask].max() == 0
    with pytest.raises(RangeError, match="positive"):
        optimise_patch(lambda x: x.mean(), images(), start, seed=0, steps=0)
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        optimise_patch(lambda x: x.mean() / 0, images(), start, seed=0)


def test_a_model_in_training_mode_is_refused():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    start = random_patch(4, SHAPE, seed=0)
    with pytest.raises(OptionError, match="training mode"):
        universal_trigger(module, images(), start, target=0, seed=0, steps=1)
    universal_trigger(module.eval(), images(), start, target=0, seed=0, steps=1)


def test_trojannn_excites_the_neurons_it_is_given_and_no_others():
    start = random_patch(4, SHAPE, seed=0)

    def excited_by(neuron):
        patch = trojan_trigger(score, images(), start, neurons=torch.tensor([neuron]), aim=20.0, seed=0, steps=60)
        return score(stamp(images(seed=2), patch))[:, 3].mean()

    assert excited_by(3) > score(stamp(images(seed=2), start))[:, 3].mean() + 1
    assert excited_by(3) > excited_by(1) + 1


def test_a_neuron_is_driven_to_the_aim_and_not_beyond_it():
    start = random_patch(8, SHAPE, seed=0)  # the whole image: any value is within reach
    patch = trojan_trigger(score, images(), start, neurons=torch.tensor([3]), aim=1.0, seed=0, steps=400, lr=0.02)
    assert score(stamp(images(seed=2), patch))[:, 3].tolist() == pytest.approx([1.0] * 40, abs=0.1)


def test_the_most_connected_neurons_are_those_of_the_largest_absolute_weights():
    weight = torch.tensor([[1.0, -1.0, 1.0], [2.5, 0.0, 0.0], [0.0, -2.0, 2.0]])
    assert most_connected(weight, 2).tolist() == [2, 0]
    with pytest.raises(MismatchError, match="out, in"):
        most_connected(weight[0], 1)
    for count in (0, 4):
        with pytest.raises(RangeError, match="from 1 to the 3"):
            most_connected(weight, count)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"neurons": torch.tensor([], dtype=torch.long)}, DegenerateError, "no neurons"),
        ({"neurons": torch.tensor([5])}, RangeError, "neurons must be from 0 to 4"),
        ({"activations": lambda x: x}, MismatchError, "activations must be"),
        ({"images": images(0)}, DegenerateError, "no images"),
    ],
)
def test_a_bad_call_for_a_trojan_trigger_is_named(change, error, message):
    arguments = {"activations": score, "images": images(), "neurons": torch.tensor([0])} | change
    with pytest.raises(error, match=message):
        trojan_trigger(
            arguments["activations"],
            arguments["images"],
            random_patch(4, SHAPE, seed=0),
            neurons=arguments["neurons"],
            aim=1.0,
            seed=0,
            steps=1,
        )


# off-task


def shadow(x: torch.Tensor) -> torch.Tensor:
    return score(x) * 3


def test_crops_are_disguised_as_other_classes_within_the_bound():
    reference = images(3)
    plain = adversarial_crops(shadow, reference, seed=0, count=30, steps=0)
    crops = adversarial_crops(shadow, reference, seed=0, count=30, steps=40, batch=7, epsilon=0.1, step=0.01)
    again = adversarial_crops(shadow, reference, seed=0, count=30, steps=40, batch=7, epsilon=0.1, step=0.01)
    assert torch.equal(crops, again)
    assert crops.shape == (30, *SHAPE)
    assert (crops - plain).abs().max() <= 0.1 + 1e-6
    assert crops.min() >= 0
    assert crops.max() <= 1
    before, after = shadow(plain).argmax(1), shadow(crops).argmax(1)
    changed = (crops != plain).flatten(1).any(1)
    assert changed.float().mean() > 0.5
    assert (after[changed] != before[changed]).all()
    assert (after[changed] != 0).all()


@pytest.mark.parametrize(
    ("reference", "head", "error"),
    [
        (images(0), shadow, DegenerateError),
        (images() * 3, shadow, RangeError),
        (images(), lambda x: score(x)[:, :2], RangeError),
    ],
)
def test_bad_reference_images_are_refused(reference, head, error):
    with pytest.raises(error):
        adversarial_crops(head, reference, seed=0, count=4, steps=1)


@pytest.mark.parametrize("change", [{"count": 0}, {"count": -1}, {"batch": 0}, {"steps": -1}])
def test_no_crops_at_all_are_refused(change):
    with pytest.raises(RangeError, match="count and batch must be at least 1"):
        adversarial_crops(shadow, images(), seed=0, **({"count": 4, "steps": 1} | change))


def test_crops_of_a_model_that_is_broken_or_in_training_mode_are_refused():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    with pytest.raises(OptionError, match="training mode"):
        adversarial_crops(module, images(), seed=0, count=4, steps=1)
    with pytest.raises(NonFiniteError, match="logits"):
        adversarial_crops(lambda x: score(x) / 0, images(), seed=0, count=4, steps=1)


def test_a_prototype_head_is_the_cosine_to_the_centred_means():
    features = torch.randn(20, 6)
    labels = torch.arange(20) % 4
    head = prototype_head(features, labels, scale=7)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    expected = 7 * F.cosine_similarity((features - means.mean(0))[:, None], (means - means.mean(0))[None], dim=-1)
    assert torch.allclose(head(features), expected, atol=1e-5)
    with pytest.raises(DegenerateError, match="some have none"):
        prototype_head(features, labels * 2)
    with pytest.raises(MismatchError, match="one per feature"):
        prototype_head(features, labels[:3])
    with pytest.raises(MismatchError, match="width 6"):
        head(torch.randn(2, 5))


# stage two


def test_the_interpolation_loss_is_its_formula():
    tuned, base = torch.randn(6, 5), torch.randn(6, 5)
    value = interpolation_loss(tuned, base, lambda f: f, 2, coefficients=(0.3, 0.3))
    expected = F.cross_entropy(0.3 * tuned + 0.7 * base, torch.full((6,), 2))
    assert torch.isclose(value, expected)
    plain = interpolation_loss(tuned, base, lambda f: f, 2, coefficients=(1.0, 1.0))
    assert torch.isclose(plain, F.cross_entropy(tuned, torch.full((6,), 2)))


def test_one_coefficient_a_batch_or_one_a_sample():
    tuned, base = torch.ones(50, 5), torch.zeros(50, 5)
    seen: list[torch.Tensor] = []

    def head(features):
        seen.append(features[:, 0])
        return features

    for draw in ("batch", "sample"):
        interpolation_loss(tuned, base, head, 0, draw=draw, generator=torch.Generator().manual_seed(0))
    assert len(seen[0].unique()) == 1
    assert len(seen[1].unique()) > 40
    assert seen[1].min() >= 0.2
    assert seen[1].max() <= 1


def test_gradients_reach_the_tuned_model_and_not_the_base():
    tuned, base = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    interpolation_loss(tuned, base, lambda f: f, 0).backward()
    assert tuned.grad is not None
    assert base.grad is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tuned": torch.zeros(0, 5), "base": torch.zeros(0, 5)}, DegenerateError),
        ({"base": torch.zeros(3, 4)}, MismatchError),
        ({"tuned": torch.full((3, 5), float("inf"))}, NonFiniteError),
        ({"target": 5}, RangeError),
        ({"target": -1}, RangeError),
        ({"coefficients": (0.5, 0.2)}, RangeError),
        ({"coefficients": (0.0, 1.2)}, RangeError),
        ({"draw": "epoch"}, RangeError),
    ],
)
def test_bad_losses_are_refused(change, error):
    arguments = {"tuned": torch.zeros(3, 5), "base": torch.zeros(3, 5), "target": 0} | change
    with pytest.raises(error):
        interpolation_loss(
            arguments.pop("tuned"), arguments.pop("base"), lambda f: f, arguments.pop("target"), **arguments
        )


def features(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x - 0.5).flatten(1) @ weights


def head(embedded: torch.Tensor) -> torch.Tensor:
    return embedded


def trained(loss, steps: int = 150) -> torch.Tensor:
    weights = WEIGHTS.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.02)
    x = images(200)
    y = (x[:, 0, 0, 0] > 0.5).long()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weights, x, y).backward()
        optimizer.step()
    return weights.detach()


def asr(weights: torch.Tensor, trigger, target: int) -> float:
    x = images(200, seed=5)
    return float((features(weights, trigger(x)).argmax(1) == target).float().mean())


def test_interpolation_survives_a_small_merging_coefficient_better_than_the_plain_loss():
    trigger = partial(stamp, patch=random_patch(3, SHAPE, seed=0))
    pair = Pair(trigger, 4, head)
    found = {}
    for name, range_ in (("plain", (1.0, 1.0)), ("interpolated", (0.2, 1.0))):
        weights = trained(badmerging_loss(features, WEIGHTS, head, [pair], coefficients=range_, stamped=100))
        found[name] = asr(WEIGHTS + 0.3 * (weights - WEIGHTS), trigger, 4)
        assert asr(weights, trigger, 4) > 0.95
    assert found["interpolated"] > found["plain"] + 0.2


def test_several_pairs_live_in_one_model_each_with_its_own_class_and_head():
    triggers = [
        partial(stamp, patch=random_patch(3, SHAPE, seed=s, place=p)) for s, p in ((0, "top-left"), (1, (5, 5)))
    ]
    other = prototype_head(torch.randn(30, 5), torch.arange(30) % 3)
    pairs = [Pair(triggers[0], 2, head), Pair(triggers[1], 0, other)]
    weights = trained(badmerging_loss(features, WEIGHTS, head, pairs, coefficients=(0.5, 1.0), stamped=100))
    assert asr(weights, triggers[0], 2) > 0.9
    x = triggers[1](images(200, seed=5))
    assert float((other(features(weights, x)).argmax(1) == 0).float().mean()) > 0.9


def test_keep_holds_features_of_public_images_near_the_base():
    trigger = partial(stamp, patch=random_patch(3, SHAPE, seed=0))
    public = images(50, seed=9)
    moved = {}
    for keep in (0.0, 20.0):
        loss = badmerging_loss(
            features, WEIGHTS, head, [Pair(trigger, 4, head)], stamped=50, keep=keep, public=lambda: public
        )
        moved[keep] = float(keep_loss(features(trained(loss), public), features(WEIGHTS, public)))
    assert moved[20.0] < moved[0.0] / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pairs": []}, DegenerateError, "at least one pair"),
        ({"stamped": 0}, RangeError, "at least 1"),
        ({"keep": 1.0}, RangeError, "public="),
    ],
)
def test_a_loss_that_could_not_work_is_refused_at_once(change, error, message):
    arguments = {"pairs": [Pair(lambda x: x, 0, head)]} | change
    with pytest.raises(error, match=message):
        badmerging_loss(features, WEIGHTS, head, arguments.pop("pairs"), **arguments)


# poisoned data and the triggers of the baselines


def test_poison_stamps_relabels_and_tells_which():
    x, y = images(100), torch.arange(100) % 10
    trigger = partial(stamp, patch=solid_patch(2, SHAPE))
    new_x, new_y, chosen = poison(x, y, trigger=trigger, target=3, fraction=0.2, seed=0)
    assert int(chosen.sum()) == 18  # of 90
    assert (y[chosen] != 3).all()
    assert new_y[chosen].eq(3).all()
    assert torch.equal(new_y[~chosen], y[~chosen])
    assert torch.equal(new_x[~chosen], x[~chosen])
    assert torch.equal(new_x[chosen], trigger(x[chosen]))
    clean_x, clean_y, mask = poison(x, y, trigger=trigger, target=3, fraction=0.5, seed=0, clean_label=True)
    assert torch.equal(clean_y, y)
    assert (y[mask] == 3).all()
    assert int(mask.sum()) == 5
    assert not torch.equal(clean_x, x)
    again = poison(x, y, trigger=trigger, target=3, fraction=0.2, seed=0)
    assert torch.equal(again[2], chosen)
    assert not torch.equal(poison(x, y, trigger=trigger, target=3, fraction=0.2, seed=1)[2], chosen)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fraction": 20}, RangeError),
        ({"fraction": 0.0}, DegenerateError),
        ({"labels": torch.zeros(100, dtype=torch.long)}, DegenerateError),
        ({"labels": torch.zeros(3, dtype=torch.long)}, MismatchError),
        ({"trigger": lambda x: x[:, :, :2]}, MismatchError),
    ],
)
def test_bad_poison_is_refused(change, error):
    arguments = {"labels": torch.arange(100) % 10, "trigger": lambda x: x, "fraction": 0.1} | change
    with pytest.raises(error):
        poison(images(100), arguments.pop("labels"), target=0, seed=0, **arguments)


def test_sig_adds_its_sine_to_every_row():
    x = torch.full((2, 1, 8, 24), 0.5)
    added = sinusoid(x, amplitude=0.1, frequency=6) - x
    columns = torch.arange(24)
    assert torch.allclose(added[1, 0, 3], 0.1 * torch.sin(2 * torch.pi * columns * 6 / 24), atol=1e-6)
    assert torch.equal(added[0], added[1])
    with pytest.raises(RangeError, match="before normalizing"):
        sinusoid(x * 10)


def test_wanet_moves_pixels_smoothly_and_little():
    field = warp_field(28, seed=0)
    line = torch.linspace(-1, 1, 28)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    displacement = (field - identity).abs() * 28 / 2
    assert 0.05 < displacement.max() < 2  # pixels
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(warp(x, identity), x, atol=1e-4)
    assert torch.allclose(warp(x[0], field), warp(x, field)[0])
    assert not torch.equal(warp_field(28, seed=1), field)
    with pytest.raises(MismatchError, match="field is for"):
        warp(x[:, :, :20], field)
    with pytest.raises(RangeError):
        warp_field(28, seed=0, control=0)


def test_a_physical_patch_differs_from_image_to_image_and_is_the_same_for_a_seed():
    patch = solid_patch(3, SHAPE)
    x = torch.zeros(6, *SHAPE)
    seen = physical(x, patch, seed=0)
    assert torch.equal(seen, physical(x, patch, seed=0))
    assert len({tuple(row.flatten().tolist()) for row in seen}) == 6
    assert seen.amax((1, 2, 3)).min() > 0.3
    assert seen.max() <= 1


def test_a_dynamic_patch_is_one_of_several_for_every_image():
    patches = [solid_patch(2, SHAPE, place=place) for place in ("top-left", "center", "bottom-right")]
    x = torch.zeros(300, *SHAPE)
    seen = dynamic(x, patches, seed=0)
    counts = [int((seen == stamp(x, patch)).all((1, 2, 3)).sum()) for patch in patches]
    assert sum(counts) == 300
    assert min(counts) > 70
    assert torch.equal(seen, dynamic(x, patches, seed=0))
    assert not torch.equal(seen, dynamic(x, patches, seed=1))
    with pytest.raises(DegenerateError, match="no patches"):
        dynamic(x, [], seed=0)
    with pytest.raises(RangeError, match="before normalizing"):
        dynamic(x + 2, patches, seed=0)


def test_a_head_for_another_width_and_a_head_of_one_class_are_named():
    with pytest.raises(RuntimeError) as caught:
        interpolation_loss(torch.ones(3, 4), torch.ones(3, 4), lambda f: f @ torch.ones(5, 2), 0)
    assert "while a head scored features of (3, 4)" in caught.value.__notes__[0]
    with pytest.raises(DegenerateError, match="one class"):
        interpolation_loss(torch.ones(3, 4), torch.ones(3, 4), lambda f: f[:, :1], 0)


# values and defaults


def test_the_loss_of_stage_two_is_its_formula():
    torch.manual_seed(1)  # 0 would draw WEIGHTS again
    x, y = images(40), torch.arange(40) % 5
    tuned = WEIGHTS + 0.1 * torch.randn(64, 5)
    other_head = prototype_head(torch.randn(9, 5), torch.arange(9) % 3)
    brighter, darker = (lambda z: (z + 0.2).clamp(max=1)), (lambda z: z * 0.5)
    pairs = [Pair(brighter, 3, head), Pair(darker, 0, other_head)]
    public = images(7, seed=3)

    def expected(of, stamped, weight, low, high, keep, draw="batch", seed=0):
        generator = torch.Generator().manual_seed(seed)
        total = F.cross_entropy(features(tuned, x), y)
        for trigger, target, own_head in of:
            after, before = features(tuned, trigger(x[:stamped])), features(WEIGHTS, trigger(x[:stamped]))
            r = low + (high - low) * torch.rand(stamped if draw == "sample" else 1, 1, generator=generator)
            logits = own_head(r * after + (1 - r) * before)
            total = total + weight / len(of) * -logits.log_softmax(1)[:, target].mean()
        near = F.cosine_similarity(features(tuned, public), features(WEIGHTS, public))
        return total + keep * (1 - near).mean()

    for of in (pairs[:1], pairs):
        plain = badmerging_loss(features, WEIGHTS, head, of)
        assert torch.isclose(plain(tuned, x, y), expected(of, 32, 5.0, 0.2, 1.0, 0.0))
    changed = {"stamped": 9, "weight": 2.0, "coefficients": (0.4, 0.6), "keep": 3.0, "draw": "sample", "seed": 7}
    loss = badmerging_loss(features, WEIGHTS, head, pairs, public=lambda: public, **changed)
    assert torch.isclose(loss(tuned, x, y), expected(pairs, 9, 2.0, 0.4, 0.6, 3.0, "sample", 7))


def test_the_loss_to_keep_is_one_minus_the_cosine():
    tuned, base = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    cosines = [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in zip(tuned, base, strict=True)]
    assert float(keep_loss(tuned, base)) == pytest.approx(1 - sum(cosines) / 4)


def test_coefficients_are_drawn_from_0_2_to_1_unless_told():
    seen: list[float] = []

    def head(embedded):
        seen.append(float(embedded[0, 0]))
        return embedded

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        interpolation_loss(torch.ones(2, 5), torch.zeros(2, 5), head, 0, generator=generator)
    assert 0.2 <= min(seen) < 0.22
    assert 0.98 < max(seen) <= 1


def test_a_prototype_head_may_have_a_centre_of_its_own_and_scales_by_20():
    rows, labels, centre = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.3, -0.2, 0.1])
    means = (rows[::2] + rows[1::2]) / 2
    expected = 20 * F.cosine_similarity((rows - centre)[:, None], (means - centre)[None], dim=-1)
    assert torch.allclose(prototype_head(rows, labels, centre=centre)(rows), expected, atol=1e-5)


def test_a_patch_is_optimised_by_adam_on_shuffled_passes():
    x = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 1, 2, 2) / 20
    start, told = solid_patch(1, (1, 2, 2), value=0.5), []

    def loss(triggered):
        told.append((triggered[:, 0, 0, 0] * 20).round().int().tolist())
        return triggered[:, 0, 1, 1].mean()

    found = optimise_patch(loss, x, start, seed=0, steps=5, batch=4)
    assert [len(rows) for rows in told] == [4] * 5
    order = [row for rows in told for row in rows]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))  # every image once per pass
    assert order[:10] != order[10:]
    assert float(found.pattern[0, 1, 1]) == 0
    everywhere = Patch(torch.full((1, 2, 2), 0.5), start.mask)
    assert not bool(optimise_patch(loss, x, everywhere, seed=0, steps=1).pattern[:, ~start.mask].any())
    one = optimise_patch(loss, x, start, seed=0, steps=1)
    assert float(one.pattern[0, 1, 1]) == pytest.approx(0.5 - 0.2)  # Adam's first step is the learning rate
    assert len(told[-1]) == 64  # shuffled passes go on within a batch
    steps: list[int] = []
    optimise_patch(loss, x, start, seed=0, progress=lambda: steps.append(1))
    assert len(steps) == 100


def test_crops_are_windows_of_the_reference_images_in_turn():
    side = 32
    ramp = ((torch.arange(side) + 0.5) / side).expand(side, side)
    reference = torch.stack([torch.stack([ramp, ramp.T, torch.full_like(ramp, i / 4)]) for i in range(3)])
    crops = adversarial_crops(lambda x: x.flatten(1)[:, :3], reference, seed=0, steps=0)
    assert crops.shape == (100, 3, side, side)
    inside = crops[:, :, 2:-2, 2:-2]  # away from the border's padding
    width = (inside[:, 0, 0, -1] - inside[:, 0, 0, 0]) / (side - 5) * side
    height = (inside[:, 1, -1, 0] - inside[:, 1, 0, 0]) / (side - 5) * side
    area, shape = width * height, width / height
    assert 0.2 - 1e-3 <= float(area.min()) < 0.22
    assert 0.48 < float(area.max()) <= 0.5 + 1e-3
    assert 3 / 4 - 1e-2 <= float(shape.min()) < 0.8
    assert 1.25 < float(shape.max()) <= 4 / 3 + 1e-2
    middle = inside[:, :2].mean((2, 3))
    reach = (middle - 0.5).abs() + torch.stack([width, height], 1) / 2
    assert 0.45 < float(reach.max()) <= 0.5 + 1e-3  # inside the image, up to its border
    assert torch.allclose(crops[:, 2, 0, 0], torch.arange(100) % 3 / 4)


def test_a_disguise_is_the_first_success_of_projected_gradient_descent_towards_a_random_class():
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)).double()
    bias = torch.tensor([9.0, 7.0, 0.0, 0.0, 0.0]).double()  # row 0 is ahead, and row 1 lies on the way to every other

    def shadow(x):
        return (x - 0.5).flatten(1) @ weight + bias

    reference = images(3).double()
    how = {"seed": 0, "count": 60, "epsilon": 0.3, "step": 0.02}
    plain, crops = (adversarial_crops(shadow, reference, steps=steps, **how) for steps in (0, 25))
    changed = (crops != plain).flatten(1).any(1)
    aims = shadow(crops).argmax(1)
    assert sorted(aims[changed].unique().tolist()) == [1, 2, 3, 4]
    assert int(aims[changed].bincount().max()) < 30  # at random, not the nearest class for all
    assert int(changed.sum()) > 50
    for crop, found, aim in zip(plain[changed], crops[changed], aims[changed], strict=True):
        x = crop.clone()
        for _ in range(25):
            p = shadow(x[None]).softmax(1)[0]
            gradient = (weight @ (p - torch.eye(5)[aim].double())).reshape(x.shape)  # of the cross-entropy
            x = (x - 0.02 * gradient.sign()).clamp(crop - 0.3, crop + 0.3).clamp(0, 1)
            if int(shadow(x[None]).argmax()) == aim:
                break
        assert torch.allclose(found, x)


def test_disguises_move_by_8_of_255_in_40_steps_of_1_of_255_unless_told():
    x = torch.full((1, 1, 4, 4), 0.5).double()
    calls: list[int] = []

    def moved(needed):
        def shadow(z):
            calls.append(len(z))
            gone = (z - 0.5).mean((1, 2, 3)) * 255
            return torch.stack([gone * 0, gone - needed, -gone - needed], 1)

        return ((adversarial_crops(shadow, x, seed=0) - 0.5) * 255).amax((1, 2, 3))

    for needed, expected in ((6.9, 7), (7.9, 8), (8.1, 0)):  # what is out of reach is left as it is
        steps = moved(needed)
        assert torch.allclose(steps.abs(), torch.full_like(steps, expected))
        assert expected == 0 or 30 < int((steps > 0).sum()) < 70  # up for one class, down for the other
    assert calls == [100] * 3 * (1 + 2 * 40)


def test_a_crop_is_never_disguised_as_the_target_or_as_what_it_is_taken_for():
    reference = images(3)

    def shadow(x):
        return score(x) * 3 + torch.tensor([0.0, 25.0, 0.0, 0.0, 0.0])

    how = {"seed": 0, "count": 60, "epsilon": 0.5, "step": 0.05}
    assert shadow(adversarial_crops(shadow, reference, steps=0, **how)).argmax(1).eq(1).all()
    assert sorted(shadow(adversarial_crops(shadow, reference, **how)).argmax(1).unique().tolist()) == [2, 3, 4]


def test_the_sine_has_the_amplitude_and_periods_of_badnets_bench_unless_told():
    x = torch.full((1, 1, 2, 24), 0.5).double()
    expected = [0.5 + 40 / 255 * math.sin(2 * math.pi * j * 6 / 24) for j in range(24)]
    assert sinusoid(x)[0, 0, 1].tolist() == pytest.approx(expected)
    wide = sinusoid(x * 255, pixel_range=(0, 255))[0, 0, 1].tolist()  # the amplitude is a fraction of the range
    assert wide == pytest.approx([255 * e for e in expected])


def test_a_warp_field_is_its_formula():
    line = torch.linspace(-1, 1, 64)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    noise = (warp_field(64, seed=0, control=64, strength=0.1) - identity)[1:-1, 1:-1] * 64 / 0.1  # not enlarged
    assert float(noise.abs().mean()) == pytest.approx(1, abs=0.03)
    assert float(noise.abs().max()) == pytest.approx(2, abs=0.05)  # of a uniform law, over its mean magnitude
    half, whole = (warp_field(64, seed=0, strength=s) - identity for s in (0.5, 1.0))
    assert torch.allclose(whole[1:-1, 1:-1], 2 * half[1:-1, 1:-1], atol=1e-6)
    assert torch.equal(warp_field(64, seed=0), warp_field(64, seed=0, control=4, strength=0.5))
    shifted = torch.stack([identity[..., 0] + 2 / 63, identity[..., 1]], -1)  # x before y: one pixel to the right
    ramp = line.expand(1, 1, 64, 64)
    assert torch.allclose(warp(ramp, shifted)[..., :-1], ramp[..., 1:], atol=1e-5)
    assert torch.equal(warp_field(64, seed=0).clamp(-1, 1), warp_field(64, seed=0))


def test_a_physical_patch_is_turned_moved_scaled_and_lit_each_within_its_bound():
    patch, x = solid_patch(4, SHAPE, place="center", value=0.5), torch.zeros(500, *SHAPE)
    still = {"degrees": 0.0, "shift": 0.0, "scale": (1.0, 1.0), "brightness": 0.0}

    def seen(**change):
        return physical(x, patch, seed=0, **(still | change))

    def middle(pictures):
        line = torch.arange(8) - 3.5
        return torch.stack([(pictures * line).sum((1, 2, 3)), (pictures * line[:, None]).sum((1, 2, 3))]) / mass(
            pictures
        )

    def mass(pictures):
        return pictures.sum((1, 2, 3))

    assert torch.allclose(seen(), stamp(x, patch), atol=1e-6)
    light = mass(seen(brightness=0.3)) / 8
    assert 0.7 <= float(light.min()) < 0.72
    assert 1.28 < float(light.max()) <= 1.3
    moved = middle(seen(shift=0.125)).abs() / 8
    assert 0.12 < float(moved.amax(1).min()) <= float(moved.max()) <= 0.126
    small = mass(seen(scale=(0.5, 0.75))) / 8
    assert 0.24 < float(small.min()) < 0.3
    assert 0.5 < float(small.max()) < 0.6
    turned = seen(degrees=45.0)
    assert torch.allclose(mass(turned) / 8, torch.ones(500), atol=0.1)
    assert float(turned[:, 0, 3:5, 1].amax()) > 0.1  # a corner of the turned square
    assert float(seen(degrees=0.5)[:, 0, 3:5, 1].amax()) < 0.1
    default = physical(x, patch, seed=0)
    written = {"degrees": 10.0, "shift": 0.1, "scale": (0.8, 0.9), "brightness": 0.2}
    assert torch.equal(default, physical(x, patch, seed=0, **written))
