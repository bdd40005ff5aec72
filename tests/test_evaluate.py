"""Metrics and their controls."""

from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn

from taskvec import BackdoorVector, load
from taskvec.calibration import recalibrate
from taskvec.defenses import shrink
from taskvec.errors import DegenerateError, MismatchError, NonFiniteError, OptionError, RangeError
from taskvec.metrics import (
    Estimate,
    Rate,
    accuracy,
    attack_success_rate,
    clustered,
    estimate,
    measure,
    predictor,
    roc,
    sweep,
    transfer_matrix,
)

EYE, LABELS = torch.eye(4), torch.arange(4)


def identity(images):
    return images


def test_wilson_intervals_are_the_textbook_ones():
    low, high = Rate(8, 10).interval
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert Rate(0, 10).interval[0] == pytest.approx(0)
    assert Rate(10, 10).interval[1] == pytest.approx(1)
    assert repr(Rate(1, 2)) == "0.500 [0.095, 0.905] n=2"


def test_accuracy_counts_in_batches_and_takes_logits_or_classes():
    for batch in (1, 3, 100):
        assert accuracy(identity, EYE, LABELS, batch=batch) == Rate(4, 4)
    assert accuracy(lambda x: x.argmax(1), EYE, torch.zeros(4, dtype=torch.long)) == Rate(1, 4)


def test_success_leaves_out_images_of_the_target_class_only():
    rate = attack_success_rate(identity, EYE, LABELS, target=2, trigger=lambda x: x + torch.tensor([0, 0, 9.0, 0]))
    assert rate == Rate(3, 3)
    assert attack_success_rate(identity, EYE, LABELS, target=2, trigger=identity) == Rate(0, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accuracy(identity, EYE[:0], LABELS[:0]), DegenerateError, "images must not be empty"),
        (lambda: accuracy(identity, EYE, LABELS[:3]), MismatchError, "one integer per image"),
        (lambda: accuracy(identity, EYE, LABELS.float()), MismatchError, "one integer per image"),
        (lambda: accuracy(lambda x: x[:1], EYE, LABELS), MismatchError, "predict must return"),
        (lambda: accuracy(lambda x: x * float("nan"), EYE, LABELS), NonFiniteError, "logits"),
        (
            lambda: attack_success_rate(identity, EYE, LABELS, target=9, trigger=identity),
            RangeError,
            "one of the 4 classes, from 0 to 3; got 9",
        ),
        (
            lambda: attack_success_rate(identity, EYE, LABELS * 0, target=0, trigger=identity),
            DegenerateError,
            "nothing to attack",
        ),
        (
            lambda: attack_success_rate(identity, EYE, LABELS, target=0, trigger=lambda x: x[:, :2]),
            MismatchError,
            "trigger must keep the shape",
        ),
        (lambda: sweep([], float, float), DegenerateError, "strengths must not be empty"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_measure_gives_the_attack_and_every_control_in_one_row():
    tasks = {"mnist": (EYE, LABELS), "other": (EYE.flip(0), LABELS)}
    shift = torch.tensor([9.0, 0, 0, 0])

    def predict(model, images, task):
        stamped = images.amax() > 1
        return images + (shift * model if stamped else 0)

    row = measure(
        predict,
        tasks,
        model=1.0,
        clean_merge=0.0,
        clean=0.0,
        base=0.0,
        attacked="mnist",
        target=0,
        trigger=lambda x: x * 2,
    )
    assert (row.asr, row.on_clean_merge, row.on_clean, row.on_base) == (Rate(3, 3), Rate(0, 3), Rate(0, 3), Rate(0, 3))
    assert row.gain == 1
    assert (row.ca, row.ba) == (0.5, 0.5)
    for part in ("ASR 1.000", "gain +1.000", "base 0.000", "2 tasks", "n=3"):
        assert part in repr(row)
    with pytest.raises(MismatchError, match="got 'letters'"):
        measure(predict, tasks, model=1, clean_merge=0, clean=0, base=0, attacked="letters", target=0, trigger=identity)


def test_sweep_keeps_the_order_and_every_model_is_made_when_it_is_scored():
    made = []

    def model_at(scale):
        made.append(scale)
        return scale

    found = sweep([1.0, 0.0], model_at, lambda model: (model, len(made)))
    assert list(found.items()) == [(1.0, (1.0, 1)), (0.0, (0.0, 2))]


def test_transfer_puts_every_vector_into_every_triggers_own_clean_model():
    vectors = [BackdoorVector({"w": torch.tensor([x])}) for x in (1.0, 10.0)]
    clean = [{"w": torch.tensor([x])} for x in (0.0, 0.25, 0.5)]
    rates = [lambda model, k=k: k + float(model["w"]) for k in range(3)]
    found = transfer_matrix(vectors, clean, rates, 0.5)
    assert found.tolist() == [[0.5, 1.75, 3.0], [5.0, 6.25, 7.5]]
    assert clean[0]["w"] == 0
    with pytest.raises(MismatchError, match="2 models for 3 triggers"):
        transfer_matrix(vectors, clean[:2], rates)
    with pytest.raises(DegenerateError, match="0 vectors and 3 rates"):
        transfer_matrix([], clean, rates)


def test_targets_of_a_seed_are_one_observation():
    values = {(0, 1): 1.0, (0, 4): 3.0, (1, 1): 4.0, (1, 4): 4.0, (2, 1): 6.0, (2, 4): 6.0}
    found = clustered(values)
    assert found.mean == 4.0
    assert found.half == pytest.approx(4.303 * 2.0 / 3**0.5)  # seeds' means are 2, 4 and 6
    assert clustered({(3, 1): 1.0, (3, 4): 2.0}) == Estimate(1.5, None)
    assert f"{found:.1f}" == "4.0 +-5.0"
    assert str(Estimate(1.5, None)) == "1.5"
    with pytest.raises(DegenerateError, match="no values"):
        estimate([])


def test_t_quantiles_beyond_the_table_are_those_of_the_textbook():
    for n, quantile in ((10, 2.262), (11, 2.228), (21, 2.086), (61, 2.000)):
        found = estimate([0.0, 1.0] * (n // 2) + [0.5] * (n % 2))
        spread = sum((x - 0.5) ** 2 for x in [0.0, 1.0] * (n // 2)) / (n - 1)
        assert found.half == pytest.approx(quantile * (spread / n) ** 0.5, rel=1e-3)


def test_roc_counts_pairs_and_allows_no_more_negatives_than_it_says():
    positives, negatives = [3.0, 1.0, 2.0, 2.0], [float(x) / 10 for x in range(19)] + [2.0]
    found = roc(positives, negatives)
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert found.area == pytest.approx(sum(pairs) / len(pairs))
    assert found.found == 0.75  # one of 20 negatives may lie above the limit, which is then 1.8
    assert roc([1.75], negatives).found == 0  # and by default no more than one of 20
    assert roc([1.75], negatives, false_positives=0.1).found == 1
    assert roc(positives, negatives, false_positives=0.0).found == 0.25  # above them all
    assert roc([1.0], [1.0]).area == 0.5
    assert roc([1.0], [2.0]).area == 0
    with pytest.raises(DegenerateError, match="0 positives"):
        roc([], negatives)
    with pytest.raises(RangeError, match="share"):
        roc(positives, negatives, false_positives=5)


def test_recalibrate_measures_the_statistics_and_leaves_the_rest():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    batches = [torch.randn(64, 2) for _ in range(4)]
    weight = module[0].weight.clone()
    recalibrate(module, batches)
    expected = torch.stack([module[0](batch).mean(0) for batch in batches]).mean(0)
    assert torch.allclose(module[1].running_mean, expected, atol=1e-5)
    assert not module.training
    assert module[1].momentum == 0.1
    assert torch.equal(module[0].weight, weight)
    with pytest.raises(DegenerateError, match="batches must not be empty"):
        recalibrate(module, [])


def test_a_model_in_training_mode_is_refused_wherever_it_is_called():
    module = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    for predict in (module, lambda images: module(images) + 0):
        with pytest.raises(OptionError, match=r"in training mode; call .eval\(\) first"):
            accuracy(predict, x, y)
        with pytest.raises(OptionError, match="training mode"):
            attack_success_rate(predict, x, y, target=0, trigger=lambda images: images)
    assert accuracy(module.eval(), x, y).n == 4
    module.train()(x)  # outside of a measurement training is as it was


def test_another_thread_may_train_meanwhile():
    module = nn.Dropout(0.5)  # in training mode

    def predict(images):
        other = Thread(target=module, args=(images,))
        other.start()
        other.join()
        return images

    assert accuracy(predict, torch.eye(3), torch.arange(3)).hits == 3  # an exception in a thread would be a warning


@pytest.mark.parametrize(
    ("hits", "n", "error"),
    [(0, 0, DegenerateError), (1, 0, DegenerateError), (3, 2, RangeError), (-1, 2, RangeError), (0, -1, RangeError)],
)
def test_rates_that_are_none_are_refused(hits, n, error):
    with pytest.raises(error, match="must be"):
        Rate(hits, n)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_is_positive(batch):
    with pytest.raises(RangeError, match="batch must be at least 1"):
        accuracy(identity, EYE, LABELS, batch=batch)
    with pytest.raises(RangeError, match="batch must be at least 1"):
        attack_success_rate(identity, EYE, LABELS, target=0, trigger=identity, batch=batch)


@pytest.mark.parametrize("target", [-1, 4, 1.0, 0.5, "1"])
@pytest.mark.parametrize("predict", [identity, lambda x: x.argmax(1)])
def test_a_target_that_is_no_class_is_refused_of_logits_and_of_class_indices(predict, target):
    with pytest.raises(RangeError, match="target must be"):
        attack_success_rate(predict, EYE, LABELS, target=target, trigger=identity)


def test_class_indices_may_name_a_target_that_no_label_has():
    labels = torch.zeros(4, dtype=torch.long)
    assert attack_success_rate(lambda x: x.argmax(1), EYE, labels, target=3, trigger=identity) == Rate(1, 4)
    with pytest.raises(MismatchError, match="class indices must be integers"):
        accuracy(lambda x: x.argmax(1).float(), EYE, LABELS)


def test_nan_has_no_rank_and_no_mean():
    nan, inf = float("nan"), float("inf")
    for bad in (([1.0, nan], [0.0]), ([1.0], [0.0, nan])):
        with pytest.raises(NonFiniteError, match="NaN"):
            roc(*bad)
    assert roc([inf], [0.0]).area == 1  # inf has a rank
    for value in (nan, inf):
        with pytest.raises(NonFiniteError, match="position 1"):
            estimate([0.0, value])
        with pytest.raises(NonFiniteError):
            clustered({(0, 0): value})


def test_recalibration_that_fails_leaves_everything_as_it_was():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2, track_running_stats=False))
    module(torch.randn(8, 2))
    module.eval()
    module[1].train()  # a part in a mode of its own
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def broken():
        yield torch.randn(8, 2)
        raise KeyError("disk")

    cases = (([], DegenerateError), (broken(), KeyError), ([torch.full((8, 2), float("nan"))], NonFiniteError))
    for batches, error in cases:
        with pytest.raises(error):
            recalibrate(module, batches)
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert [part.training for part in module.modules()] == [False, False, True, False]
        assert module[0].momentum == 0.1
    recalibrate(module, [torch.ones(8, 2)])
    assert module[0].running_mean.tolist() == [1, 1]
    assert [part.training for part in module.modules()] == [False, False, True, False]


def counted(model, images, task):
    """Class indices: so many clean images right, one fewer in task b, and so many stamped ones taken for class 8."""
    assert len(images) <= 4  # the batch
    right, hits = model
    order = images.argmax(1)
    clean = torch.where(order < right - (task == "b"), order, (order + 1) % 9)
    return torch.where(images.amax(1) > 1, torch.where(order < hits, 8, 0), clean)


def test_every_control_is_measured_on_its_own_model():
    row = measure(
        counted,
        {"a": (torch.eye(9), torch.arange(9)), "b": (torch.eye(9), torch.arange(9))},
        model=(6, 5),
        clean_merge=(7, 1),
        clean=(8, 2),
        base=(5, 3),
        attacked="a",
        target=8,
        trigger=lambda x: x * 2,
        batch=4,
    )
    expected = {"attacked": "a", "target": 8, "asr": 5 / 8, "n": 8, "gain": 4 / 8}
    expected |= {"on_base": 3 / 8, "on_clean": 2 / 8, "on_clean_merge": 1 / 8, "ca": 6.5 / 9, "ba": 5.5 / 9}
    expected |= {"clean_accuracy.a": 7 / 9, "clean_accuracy.b": 6 / 9, "accuracy.a": 6 / 9, "accuracy.b": 5 / 9}
    assert row.row() == pytest.approx(expected)
    assert "base 0.375, clean model 0.250, clean merge 0.125; accuracy 0.611 (clean merge 0.722" in repr(row)


def test_a_sweep_without_a_score_returns_the_models():
    models = sweep([0.0, 1.0], partial(shrink, {"w": torch.ones(1)}, {"w": torch.zeros(1)}))
    assert {s: float(model["w"]) for s, model in models.items()} == {0.0: 1.0, 1.0: 0.0}


def test_a_predictor_runs_the_module_with_any_parameters_and_changes_nothing():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    other[1].running_mean += 1
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    predict = predictor(module)
    params = {name: tensor.requires_grad_(name.startswith("0.")) for name, tensor in load(other).items()}
    assert torch.equal(predict(params, EYE), other(EYE))
    predict(params, EYE).sum().backward()
    assert params["0.bias"].grad is not None
    assert all(torch.equal(own[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(MismatchError, match=r"only in the module"):
        predict({name: params[name] for name in list(params)[1:]}, EYE)
    with pytest.raises(MismatchError, match=r"'0.weight' is"):
        predict(params | {"0.weight": torch.ones(3, 5)}, EYE)
    with pytest.raises(OptionError, match="params must be a mapping"):
        predict(other, EYE)
    with pytest.raises(OptionError, match="module must be"):
        predictor(dict(module.named_parameters()))
    with pytest.raises(OptionError, match="training mode"):
        accuracy(partial(predictor(nn.Linear(4, 4)), load(nn.Linear(4, 4))), EYE, LABELS)


def test_a_predictor_takes_a_tied_weight_under_one_of_its_names():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).eval()
    module[1].weight = module[0].weight
    weight = torch.randn(3, 3)
    expected = torch.eye(3) @ weight.T @ weight.T
    for params in ({"0.weight": weight}, {"0.weight": weight, "1.weight": weight}):
        assert torch.allclose(predictor(module)(params, torch.eye(3)), expected)


# values: each against the textbook, or a number found by hand


TEXTBOOK = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # t at 97.5 %, from 1 degree


@pytest.mark.parametrize(("freedom", "quantile"), list(enumerate(TEXTBOOK, 1)))
def test_the_half_width_has_the_t_quantile_of_its_degrees_of_freedom(freedom, quantile):
    values = [float(i * i) for i in range(freedom + 1)]
    middle = sum(values) / len(values)
    spread = (sum((x - middle) ** 2 for x in values) / freedom) ** 0.5
    found = estimate(values)
    assert found.mean == pytest.approx(middle)
    assert found.half == pytest.approx(quantile * spread / len(values) ** 0.5, rel=1e-3)


def test_the_wilson_interval_covers_95_percent():
    for hits, n in ((3, 7), (50, 100), (999, 1000)):
        for bound in Rate(hits, n).interval:  # its ends are where the normal test of that fraction is just at 5 %
            assert (hits / n - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-5)


def test_vectors_are_transferred_at_scale_one_unless_told():
    found = transfer_matrix(
        [BackdoorVector({"w": torch.tensor([3.0])})], [{"w": torch.ones(1)}], [lambda m: float(m["w"])]
    )
    assert found.tolist() == [[4.0]]


def test_an_image_of_the_target_class_never_counts_and_the_trigger_sees_no_such_image():
    seen = []

    def trigger(images):
        seen.append(images)
        return images

    rate = attack_success_rate(lambda x: x * 0 + torch.eye(4)[1], EYE, LABELS, target=1, trigger=trigger)
    assert rate == Rate(3, 3)
    assert torch.equal(seen[0], EYE[[0, 2, 3]])


def test_statistics_are_those_of_the_network_without_dropout():
    """A network that drops half of its entries has other means and variances, and other ones at every call."""
    torch.manual_seed(0)
    batches = [torch.randn(64, 6) + 1 for _ in range(3)]
    plain = nn.Sequential(nn.Identity(), nn.BatchNorm1d(6))
    dropping = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    recalibrate(plain, batches)
    recalibrate(dropping, batches)
    for own, other in zip(dropping[1].buffers(), plain[1].buffers(), strict=True):
        assert torch.equal(own, other)
    assert dropping[0].training


def test_recalibrated_statistics_are_plain_means_over_batches():
    module = nn.BatchNorm1d(2, momentum=0.5)
    batches = [torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[5.0, 1.0], [5.0, 1.0]]), torch.ones(2, 2)]
    recalibrate(module, batches)
    assert module.running_mean.tolist() == pytest.approx([(2 + 5 + 1) / 3, (2 + 1 + 1) / 3])
    assert module.running_var.tolist() == pytest.approx([2 / 3, 8 / 3])  # of n - 1 degrees of freedom, as in training
    assert module.num_batches_tracked == 3
