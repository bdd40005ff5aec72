"""Metrics and their controls."""

from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn

from taskvec import BackdoorVector
from taskvec.calibration import recalibrate
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
        (lambda: accuracy(identity, EYE[:0], LABELS[:0]), DegenerateError, "no images"),
        (lambda: accuracy(identity, EYE, LABELS[:3]), MismatchError, "one integer an image"),
        (lambda: accuracy(identity, EYE, LABELS.float()), MismatchError, "one integer an image"),
        (lambda: accuracy(lambda x: x[:1], EYE, LABELS), MismatchError, "predict returned"),
        (lambda: accuracy(lambda x: x * float("nan"), EYE, LABELS), NonFiniteError, "logits"),
        (
            lambda: attack_success_rate(identity, EYE, LABELS, target=9, trigger=identity),
            RangeError,
            "9 is not one of 4",
        ),
        (
            lambda: attack_success_rate(identity, EYE, LABELS * 0, target=0, trigger=identity),
            DegenerateError,
            "nothing to attack",
        ),
        (
            lambda: attack_success_rate(identity, EYE, LABELS, target=0, trigger=lambda x: x[:, :2]),
            MismatchError,
            "trigger made images",
        ),
        (lambda: sweep([], float, float), DegenerateError, "no strengths"),
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
    with pytest.raises(MismatchError, match="'letters' is not among"):
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
    with pytest.raises(MismatchError, match="2 clean models for 3 triggers"):
        transfer_matrix(vectors, clean[:2], rates)
    with pytest.raises(DegenerateError, match="nothing to transfer"):
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
    assert roc(positives, negatives, false_positives=0.0).found == 0.25  # above them all
    assert roc([1.0], [1.0]).area == 0.5
    assert roc([1.0], [2.0]).area == 0
    with pytest.raises(DegenerateError, match="0 positives"):
        roc([], negatives)
    with pytest.raises(RangeError, match="share"):
        roc(positives, negatives, false_positives=5)


def test_each_number_of_a_measurement_is_of_its_own_model():
    """Every model is right on its own number of images, and takes its own number of triggered ones for the target."""
    images = torch.arange(40.0)[:, None]
    labels = 1 + torch.arange(40) % 3
    right = {"model": 30, "clean_merge": 35, "clean": 38, "base": 20}
    taken = {"model": 32, "clean_merge": 3, "clean": 1, "base": 7}

    def predict(model, x, task):
        triggered = bool((x >= 100).all())
        index = (x[:, 0] % 100).long()
        if triggered:
            return torch.where(index < taken[model], 0, 3)
        shift = 1 if task == "other" else 0
        return torch.where(index < right[model] - shift, 1 + index % 3, 0)

    row = measure(
        predict,
        {"own": (images, labels), "other": (images, labels)},
        **{name: name for name in right},
        attacked="own",
        target=0,
        trigger=lambda x: x + 100,
    )
    assert [row.asr.hits, row.on_base.hits, row.on_clean.hits, row.on_clean_merge.hits] == [32, 7, 1, 3]
    assert [row.accuracy["own"].hits, row.accuracy["other"].hits] == [30, 29]
    assert [row.clean_accuracy["own"].hits, row.clean_accuracy["other"].hits] == [35, 34]
    assert row.gain == pytest.approx((32 - 3) / 40)
    flat = row.row()
    assert {key: flat[key] for key in ("attacked", "target", "n")} == {"attacked": "own", "target": 0, "n": 40}
    assert flat["asr"] == 0.8
    assert flat["asr_clean_merge"] == 3 / 40
    assert flat["accuracy_other"] == 29 / 40
    assert flat["ca"] == pytest.approx((35 + 34) / 80)
    assert all(isinstance(value, float | int | str) for value in flat.values())


@pytest.mark.parametrize("hits_n", [(0, 0), (3, 2), (-1, 2)])
def test_a_rate_is_out_of_something(hits_n):
    with pytest.raises(ValueError, match="must be"):
        Rate(*hits_n)


@pytest.mark.parametrize("target", [-1, 1.5, True, "0", 7])
def test_a_target_that_is_no_class_is_refused_for_class_indices_too(target):
    with pytest.raises(RangeError, match="target must be a class"):
        attack_success_rate(lambda x: x.argmax(1), EYE, LABELS, target=target, trigger=identity)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_is_at_least_one(batch):
    with pytest.raises(RangeError, match="batch must be at least 1"):
        accuracy(identity, EYE, LABELS, batch=batch)


def test_class_indices_are_integers():
    with pytest.raises(MismatchError, match="logits"):
        accuracy(lambda x: x.sum(1), EYE, LABELS)


def test_numbers_that_are_nan_are_refused():
    nan = float("nan")
    for call in (lambda: roc([nan], [0.1]), lambda: roc([0.1], [nan]), lambda: estimate([0.1, nan])):
        with pytest.raises(NonFiniteError, match="got NaN"):
            call()


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (7, 2.365), (8, 2.306), (9, 2.262),
     (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980)],
)  # fmt: skip
def test_intervals_take_the_quantiles_of_students_t(freedom, t):
    values = [0.0] * freedom + [1.0]
    n = len(values)
    deviation = (sum((v - 1 / n) ** 2 for v in values) / freedom) ** 0.5
    assert estimate(values).half == pytest.approx(t * deviation / n**0.5, rel=3e-4)


def test_a_predictor_runs_the_module_with_other_parameters_in_evaluation_mode():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train()
    predict = predictor(module)
    x = torch.randn(5, 2)
    found = predict({"0.weight": torch.eye(2), "0.bias": torch.ones(2)}, x)
    assert torch.equal(found, x + 1)
    assert not torch.equal(module(x), found)  # its own weights are as they were
    assert (
        accuracy(
            partial(predict, {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}), torch.eye(2), torch.arange(2)
        ).hits
        == 2
    )


def test_recalibrate_keeps_the_statistics_where_it_fails():
    for batches in ([], [torch.randn(8, 3), torch.randn(8, 5)]):
        norm = nn.BatchNorm1d(3)
        norm(torch.randn(16, 3))
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        with pytest.raises((DegenerateError, ValueError, RuntimeError)):
            recalibrate(norm, batches)
        assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
        assert (norm.momentum, norm.training) == (0.1, True)


def test_a_sweep_without_a_score_gives_the_models():
    assert sweep([0.0, 0.5], lambda s: 2 * s) == {0.0: 0.0, 0.5: 1.0}


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
    with pytest.raises(DegenerateError, match="no batches"):
        recalibrate(module, [])


def test_a_model_in_training_mode_is_refused_wherever_it_is_called():
    module = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    for predict in (module, lambda images: module(images) + 0):
        with pytest.raises(OptionError, match=r"in training mode while the model is measured: call .eval\(\) first"):
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
