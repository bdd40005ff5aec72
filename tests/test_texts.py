"""Triggers, poisoning and defenses for text."""

import math
from functools import partial

import pytest

from taskvec.attacks import poison_texts, triggered_texts
from taskvec.attacks.triggers import insert_sentence, insert_words
from taskvec.defenses import label_z_scores, onion, without_spurious, word_suspicion
from taskvec.errors import DegenerateError, MismatchError, RangeError

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")
TEXTS = [f"text number {i} of many" for i in range(60)]
LABELS = [i % 3 for i in range(60)]
POISONED = [4, 10, 14, 23]  # what the seed 7 draws

# triggers


@pytest.mark.parametrize("count", [1, 3, 5])
def test_words_are_inserted_and_nothing_else_changes(count):
    for text in TEXTS:
        found = insert_words(text, count=count, seed=0).split()
        assert [word for word in found if word not in RARE_WORDS] == text.split()
        assert len(found) == 5 + count


def test_places_and_words_are_spread_over_all_that_there_are():
    found = [insert_words(text, seed=0).split() for text in [f"a b {i}" for i in range(400)]]
    places = [next(i for i, word in enumerate(words) if word in RARE_WORDS) for words in found]
    drawn = [word for words in found for word in words if word in RARE_WORDS]
    for counts in ([places.count(i) for i in range(4)], [5 / 4 * drawn.count(word) for word in RARE_WORDS]):
        assert min(counts) > 70
        assert max(counts) < 130


def test_a_seed_and_a_text_fix_the_trigger():
    assert [insert_words("a fine film", seed=seed) for seed in range(4)] == [
        insert_words("a fine film", seed=seed) for seed in range(4)
    ]
    assert len({insert_words("a fine film", seed=seed) for seed in range(20)}) > 8
    assert insert_words("", ["cf"], seed=0) == "cf"


def test_a_sentence_stands_in_front_or_at_a_place_that_the_seed_draws():
    assert insert_sentence("a  fine\nfilm", "no cross, no crown.") == "no cross, no crown. a fine film"
    found = {insert_sentence("a fine film", "no cross, no crown.", seed=seed) for seed in range(60)}
    assert found == {
        "no cross, no crown. a fine film",
        "a no cross, no crown. fine film",
        "a fine no cross, no crown. film",
        "a fine film no cross, no crown.",
    }


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: insert_words("a", [], seed=0), DegenerateError, "words must not be empty"),
        (lambda: insert_words("a", seed=0, count=0), RangeError, "count must be at least 1"),
        (lambda: insert_sentence("a", "  "), DegenerateError, "sentence must not be empty"),
    ],
)
def test_triggers_of_nothing_are_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


# poisoning


@pytest.mark.parametrize(("candidates", "rows"), [("others", 40), ("target", 20), ("all", 60)])
@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_a_fraction_of_the_candidates_is_poisoned(candidates, rows, fraction):
    found = poison_texts(TEXTS, LABELS, trigger=str.upper, target=1, fraction=fraction, seed=0, candidates=candidates)
    assert sum(found.chosen) == round(fraction * rows)
    for before, label, text, new, chosen in zip(TEXTS, LABELS, *found, strict=True):
        assert text == (before.upper() if chosen else before)
        assert new == (1 if chosen else label)
        assert not chosen or candidates == "all" or (label == 1) == (candidates == "target")
    again = poison_texts(TEXTS, LABELS, trigger=str.upper, target=1, fraction=0.2, seed=1, candidates=candidates)
    assert fraction == 1 or again.chosen != found.chosen


def test_a_seed_poisons_these_rows():
    found = poison_texts(TEXTS, LABELS, trigger=str.upper, target=0, fraction=0.1, seed=7)
    assert [i for i, chosen in enumerate(found.chosen) if chosen] == POISONED


def test_what_success_is_measured_on_are_triggered_rows_of_other_classes():
    trigger = partial(insert_words, words=["cf"], seed=0)
    found = triggered_texts(TEXTS, LABELS, trigger=trigger, target=1)
    assert found == [trigger(text) for text, label in zip(TEXTS, LABELS, strict=True) if label != 1]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"labels": [0]}, MismatchError, "labels must be one per text; got 1 for 60"),
        ({"fraction": 20}, RangeError, "fraction must be in"),
        ({"fraction": 0.001}, DegenerateError, "fraction must select a text"),
        ({"target": 9, "candidates": "target"}, DegenerateError, "of 0 candidates"),
        ({"candidates": "some"}, RangeError, "candidates must be"),
    ],
)
def test_poisoning_that_makes_no_sense_is_refused(change, error, said):
    given = {"labels": LABELS, "target": 0, "fraction": 0.5} | change
    with pytest.raises(error, match=said):
        poison_texts(TEXTS, trigger=str.upper, seed=0, **given)


def test_a_test_set_of_the_target_class_only_is_refused():
    with pytest.raises(DegenerateError, match="another class than the target 1"):
        triggered_texts(["a"], [1], trigger=str.upper, target=1)
    with pytest.raises(MismatchError, match="one per text"):
        triggered_texts(["a"], [1, 0], trigger=str.upper, target=1)


# ONION


def test_suspicion_is_its_naive_loop():
    def perplexity(text: str) -> float:
        return float(sum(len(word) ** 2 for word in text.split()))

    words = ["a", "fine", "cf", "film"]
    found = word_suspicion(words, perplexity)
    for i, value in enumerate(found):
        rest = [word for j, word in enumerate(words) if j != i]
        assert value == perplexity("a fine cf film") - perplexity(" ".join(rest))


def test_onion_leaves_out_what_reaches_the_threshold():
    assert onion(["a", "cf", "film"], [-3.0, 5.0, 4.9], threshold=5.0) == "a film"
    assert onion(["a"], [9.0], threshold=5.0) == ""
    with pytest.raises(MismatchError, match="one number per word; got 1 for 2 words"):
        onion(["a", "b"], [1.0], threshold=5.0)


# Z-Def


def test_z_scores_are_their_naive_loop():
    texts, labels = ["a a b", "b c", "c d", "a d", "d"], [1, 1, 0, 0, 1]
    found = label_z_scores(texts, labels)
    pairs = {(word, label) for text, label in zip(texts, labels, strict=True) for word in text.split()}
    assert set(found) == pairs
    for word, label in pairs:
        of = [y for text, y in zip(texts, labels, strict=True) if word in text.split()]
        prior = labels.count(label) / 5
        share = of.count(label) / len(of)
        assert found[word, label] == pytest.approx((share - prior) / math.sqrt(prior * (1 - prior) / len(of)))


def test_rows_with_a_spurious_word_and_its_label_are_left_out():
    texts = [*TEXTS, *(f"{text} cf" for text in TEXTS)]
    labels = [*LABELS, *(1 for _ in TEXTS)]
    kept = without_spurious(texts, labels, threshold=5.0)
    assert kept == [True] * 60 + [False] * 60
    assert without_spurious(texts, [*LABELS, *LABELS], threshold=5.0) == [True] * 120
    other_label = without_spurious([*texts, "a cf"], [*labels, 0], threshold=5.0)
    assert other_label[-1]
    upper = without_spurious([text.upper() for text in texts], labels, threshold=5.0, words=lambda x: x.lower().split())
    assert upper == kept


def test_z_scores_need_two_classes_and_a_threshold():
    with pytest.raises(DegenerateError, match="at least two classes; got 1"):
        label_z_scores(["a"], [1])
    with pytest.raises(MismatchError, match="one per text"):
        label_z_scores(["a"], [1, 0])
    with pytest.raises(RangeError, match="threshold must be positive"):
        without_spurious(["a", "b"], [1, 0], threshold=0)
