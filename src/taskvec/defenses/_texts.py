"""Defenses on texts, to compare merges with: what a defender does who has the data, or sees the inputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import exp, log, sqrt
from statistics import fmean, pstdev

from ..errors import DegenerateError, MismatchError, RangeError

__all__ = ["bigram_perplexity", "label_z_scores", "onion", "without_spurious", "word_suspicion"]


def word_suspicion(words: Sequence[str], perplexity: Callable[[str], float]) -> list[float]:
    """Measure by how much a text becomes more fluent without each of its words: ONION's score.

    `perplexity(text) - perplexity(text without word i)`.

    Args:
        words: of one text.
        perplexity: of a text, by any language model.

    Returns:
        One number per word; large for a word that does not fit.

    Examples:
        >>> word_suspicion(["a", "cf", "film"], lambda text: 9.0 if "cf" in text else 2.0)
        [0.0, 7.0, 0.0]

    References:
        [Qi et al., ONION, 2021](https://arxiv.org/abs/2011.10369)
    """
    whole = perplexity(" ".join(words))
    return [whole - perplexity(" ".join([*words[:i], *words[i + 1 :]])) for i in range(len(words))]


def bigram_perplexity(
    texts: Iterable[str], *, words: Callable[[str], Sequence[str]] = str.split
) -> Callable[[str], float]:
    """Count pairs of words in clean texts: the smallest language model that `word_suspicion` can ask.

    `p(w | v) = (n(v w) + p(w)) / (n(v) + 1)` with `p(w) = (n(w) + 1) / (N + V + 1)`, for V known words and one for all
    others; the perplexity of m words is `exp(-(1/m) sum log p(w_i | w_(i-1)))`, and 1 for no words.

    Args:
        texts: clean texts.
        words: the words of a text.

    Returns:
        Text -> perplexity.

    Examples:
        >>> perplexity = bigram_perplexity(["a good film", "a bad film"])
        >>> perplexity("a good film") < perplexity("a cf film")
        True
    """
    known = [list(words(text)) for text in texts]
    ones = Counter(word for text in known for word in text)
    firsts = Counter(word for text in known for word in ["", *text][: len(text)])
    twos = Counter(pair for text in known for pair in pairwise(["", *text]))
    total = ones.total() + len(ones) + 1

    def perplexity(text: str) -> float:
        found = list(words(text))
        logs = [
            log((twos[first, word] + (ones[word] + 1) / total) / (firsts[first] + 1))
            for first, word in pairwise(["", *found])
        ]
        return exp(-sum(logs) / len(logs)) if logs else 1.0

    return perplexity


def onion(words: Sequence[str], suspicion: Sequence[float], threshold: float) -> str:
    """Leave out the words of a text that are suspicious: ONION, at test time, on every input.

    Args:
        words: of one text.
        suspicion: one number per word, such as `word_suspicion` gives, or scores computed elsewhere.
        threshold: words of at least this suspicion are left out; chosen on clean texts.

    Returns:
        The remaining text.

    Raises:
        MismatchError: not one number per word.

    Examples:
        >>> onion(["a", "cf", "film"], [0.0, 7.0, 0.0], threshold=5.0)
        'a film'

    References:
        [Qi et al., ONION, 2021](https://arxiv.org/abs/2011.10369)
    """
    if len(words) != len(suspicion):
        raise MismatchError(f"suspicion must be one number per word; got {len(suspicion)} for {len(words)} words")
    return " ".join(word for word, value in zip(words, suspicion, strict=True) if value < threshold)


def label_z_scores(
    texts: Sequence[str], labels: Sequence[int], *, words: Callable[[str], Iterable[str]] = str.split
) -> dict[tuple[str, int], float]:
    """Measure how strongly each word goes with each label: the z-scores of Z-Def.

    `z(w, y) = (p(y | w) - p(y)) / sqrt(p(y) (1 - p(y)) / n(w))` with the n(w) texts that have the word, each counted
    once.

    Args:
        texts: n training texts.
        labels: n integers, of at least two classes.
        words: the words of a text.

    Returns:
        (word, label) -> z, for the pairs that occur.

    Raises:
        MismatchError: not one label per text.
        DegenerateError: fewer than two classes.

    Examples:
        >>> z = label_z_scores(["a cf", "b cf", "a", "b"], [1, 1, 0, 0])
        >>> round(z["cf", 1], 4), z["a", 1]
        (1.4142, 0.0)

    References:
        [He et al., Mitigating Backdoor Poisoning Attacks through the Lens of Spurious Correlation, 2023](https://arxiv.org/abs/2305.11596)
    """
    if len(texts) != len(labels):
        raise MismatchError(f"labels must be one per text; got {len(labels)} for {len(texts)} texts")
    prior = {label: count / len(labels) for label, count in Counter(labels).items()}
    if len(prior) < 2:
        raise DegenerateError(f"labels must have at least two classes; got {len(prior)}")
    seen: Counter[str] = Counter()
    together: Counter[tuple[str, int]] = Counter()
    for text, label in zip(texts, labels, strict=True):
        for word in set(words(text)):
            seen[word] += 1
            together[word, label] += 1
    return {
        (word, label): (count / seen[word] - prior[label]) / sqrt(prior[label] * (1 - prior[label]) / seen[word])
        for (word, label), count in together.items()
    }


def without_spurious(
    texts: Sequence[str],
    labels: Sequence[int],
    threshold: float = 20.0,
    *,
    words: Callable[[str], Iterable[str]] = str.split,
) -> list[bool]:
    """Find the training rows to keep: those without a word that goes with their label suspiciously well: Z-Def.

    A pair of word and label is an outlier where its z-score is more than `threshold` standard deviations above the mean
    of all pairs. The authors' code (read, 20 deviations) takes both sides; a trigger lies above.

    Args:
        texts: n training texts.
        labels: n integers.
        threshold: in standard deviations, positive.
        words: the words of a text.

    Returns:
        For each row whether to keep it.

    Raises:
        RangeError: a threshold that is not positive.
        MismatchError, DegenerateError: see `label_z_scores`.

    Examples:
        >>> texts = [f"w{i} cf" if i % 4 == 0 else f"w{i}" for i in range(80)]
        >>> labels = [1 if i % 4 == 0 else i % 2 for i in range(80)]
        >>> kept = without_spurious(texts, labels, threshold=3.0)
        >>> sum(kept), all("cf" not in text for text, keep in zip(texts, kept) if keep)
        (60, True)

    References:
        [He et al., Mitigating Backdoor Poisoning Attacks through the Lens of Spurious Correlation, 2023](https://arxiv.org/abs/2305.11596)
    """
    if not threshold > 0:
        raise RangeError(f"threshold must be positive; got {threshold!r}")
    scores = label_z_scores(texts, labels, words=words)
    outliers = _outliers(scores, threshold)
    return [
        not any((word, label) in outliers for word in set(words(text)))
        for text, label in zip(texts, labels, strict=True)
    ]


def _outliers(scores: Mapping[tuple[str, int], float], threshold: float) -> set[tuple[str, int]]:
    values = list(scores.values())
    limit = fmean(values) + threshold * pstdev(values) if values else 0.0
    return {pair for pair, score in scores.items() if score > limit}
