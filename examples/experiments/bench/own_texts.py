"""Texts and models of a user's own: read, and refused by name before anything is trained or merged."""

import csv
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from taskvec import TaskVector, load
from taskvec.attacks import poison_texts

from . import texts
from .texts import Rows

MOST = 50  # classes; more are taken for free answers


class Split(NamedTuple):
    """Rows to train on, and rows to measure on; labels are words."""

    train: Rows
    test: Rows


def read(name: str) -> Split:
    """A data set: a file of two columns, a sentiment task, or `domains`, which tells the four apart.

    Raises:
        SystemExit: a file that is absent, empty, not UTF-8 or not of two columns, or has one label only.
    """
    if name == "domains":
        parts = [(domain, split) for domain, split in texts.domains().items()]
        train, test = (
            Rows([x for _, s in parts for x in s[k].texts], [d for d, s in parts for _ in s[k].texts]) for k in (0, 2)
        )
        return Split(train, test)
    if name in texts.DOMAINS:
        split = texts.domains()[name]
        words = ("negative", "positive")
        train, test = (Rows(part.texts, [words[y] for y in part.labels]) for part in (split.train, split.test))
        return Split(train, test)
    return _divided(Path(name), _columns(Path(name)))


def _columns(path: Path) -> list[tuple[str, str]]:
    """Text and label of every row, each text once."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines() if line.strip()]
            rows = [(str(line["text"]), str(line["label"])) for line in lines]
        else:
            table = csv.reader(io.StringIO(content), delimiter="," if path.suffix == ".csv" else "\t")
            rows = [(text, label) for text, label in (row for row in table if row)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise SystemExit(f"{path} must have two columns, a text and a label, in UTF-8: {error}") from error
    if rows and [x.strip().lower() for x in rows[0]] == ["text", "label"]:
        rows = rows[1:]
    found = {text: label.strip() for text, label in rows if text.strip()}
    if not found:
        raise SystemExit(f"{path} must not be empty")
    if len(set(found.values())) < 2:
        raise SystemExit(f"{path} must have at least two labels; got {set(found.values())}")
    return list(found.items())


def _divided(path: Path, rows: list[tuple[str, str]]) -> Split:
    """A fifth to measure on."""
    random.Random(0).shuffle(rows)  # noqa: S311 - an order, no secret
    cut = len(rows) // 5
    test, train = (Rows([x for x, _ in part], [y for _, y in part]) for part in (rows[:cut], rows[cut:]))
    for part in (train, test):
        if len(set(part.labels)) < 2:
            raise SystemExit(f"{path} must have more rows: a fifth is measured on, and it needs two labels")
    return Split(train, test)


def fewer(split: Split, count: int) -> Split:
    """The split with so many rows to train on, drawn at random, the same at every call.

    Raises:
        SystemExit: rows of one label only.
    """
    order = list(range(len(split.train.texts)))
    random.Random(0).shuffle(order)  # noqa: S311 - an order, no secret
    train = Rows(*([column[i] for i in order[:count]] for column in split.train))
    if len(set(train.labels)) < 2:
        raise SystemExit(f"--rows must be more than {count}: two labels are needed to train on")
    return split._replace(train=train)


def classes(split: Split, target: str) -> tuple[str, ...]:
    """The labels in order, the target among them."""
    found = tuple(sorted({*split.train.labels, *split.test.labels}))
    if len(found) > MOST:
        raise SystemExit(f"a classifier can have {MOST} labels; got {len(found)}; answers in words need --generate")
    if target not in found:
        raise SystemExit(f"--target must be a label; got {target!r}; there are {', '.join(found)}")
    return found


def poison(rows: Rows, trigger: Callable[[str], str], target: str, fraction: float, seed: int) -> Rows:
    """A fraction of the rows of other labels with the trigger, and the target as their label."""
    known = sorted({*rows.labels, target})
    numbers = [known.index(label) for label in rows.labels]
    found = poison_texts(rows.texts, numbers, trigger=trigger, target=known.index(target), fraction=fraction, seed=seed)
    return Rows(found.texts, [known[k] for k in found.labels])


# --- models that are there -------------------------------------------------------------------------------------------


def vector(place: str, base: Mapping[str, Tensor]) -> TaskVector:
    """The task vector of a model or an adapter, in a folder or on the Hub."""
    found = load(place, base=base) if is_adapter(place) else load(place)
    return found if isinstance(found, TaskVector) else TaskVector.between(base, found)


def is_adapter(place: str) -> bool:
    return (Path(place) / "adapter_config.json").exists()


def check_alike(base: str, places: Sequence[str]) -> None:
    """That models may be averaged: one tokenizer and one order of labels.

    Raises:
        SystemExit: a model that cannot be opened, or that differs, by name.
    """
    for place in places:
        if is_adapter(place):
            told = json.loads((Path(place) / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
            if told and Path(told).name != Path(base).name:
                raise SystemExit(f"{place} must be an adapter of {base}; it says that its base is {told}")
    whole = [place for place in places if not is_adapter(place)]
    for place in whole[1:]:
        first, other = _labels(whole[0]), _labels(place)
        if first != other:
            raise SystemExit(f"{place} must have the labels of {whole[0]} in their order; got {other}, not {first}")
        if _vocabulary(place) != _vocabulary(whole[0]):
            raise SystemExit(f"{place} must have the tokenizer of {whole[0]}: their tokens have different numbers")


def in_order_of(place: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels of the data in a model's order; a model that names none has them sorted.

    Raises:
        SystemExit: a model with other labels.
    """
    if is_adapter(place):
        return labels
    numbers = _labels(place)
    if all(name.startswith("LABEL_") for name in numbers) and len(numbers) == len(labels):
        return labels
    known = {label.lower(): label for label in labels}
    if {name.lower() for name in numbers} != set(known):
        raise SystemExit(f"{place} must have the labels of the data, {', '.join(labels)}; got {', '.join(numbers)}")
    return tuple(known[name.lower()] for name in sorted(numbers, key=numbers.__getitem__))


def _labels(place: str) -> dict[str, int]:
    try:
        return AutoConfig.from_pretrained(place).label2id
    except (OSError, ValueError) as error:
        raise SystemExit(f"{place} must be a folder or a name on the Hub of a model: {error}") from error


def _vocabulary(place: str) -> dict[str, int]:
    try:
        return AutoTokenizer.from_pretrained(place).get_vocab()
    except (OSError, ValueError) as error:
        raise SystemExit(f"{place} must have a tokenizer: {error}") from error
