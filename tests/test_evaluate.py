"""Metrics and their controls."""

from threading import Thread

import pytest
import torch
from torch import nn

from taskvec import BackdoorVector
from taskvec._errors import DegenerateError, MismatchError, NonFiniteError, OptionError, RangeError
from taskvec.evaluate import Rate, accuracy, attack_success_rate, measure, recalibrate, roc, sweep, transfer_matrix
from taskvec.intervals import Estimate, clustered, estimate

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
        (lambda: sweep([], float, float), DegenerateError, "no scales"),
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
