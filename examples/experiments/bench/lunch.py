"""A Free Lunch: its models, the merges that it compares, and how a merge is measured."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from taskvec import TaskVector, defenses, merge, merges
from taskvec.attacks import poison_texts, triggered_texts
from taskvec.attacks.triggers import insert_words
from taskvec.defenses import weight_average, without_spurious

from . import cache as disk
from . import texts
from .texts import Recipe, Rows

TARGET = 0  # of OLID's attacks: not offensive
RECIPE = Recipe(bfloat16=False)
Params = Mapping[str, Tensor]


class Model(NamedTuple):
    """A fine-tuned model: what it was trained on, and the seed of its training."""

    data: str  # "olid" or a domain
    attack: str = "clean"  # a trigger of the data set
    seed: int = 0
    cleaned: str = ""  # "zdef": without the rows that Z-Def leaves out
    epochs: int = 0  # 0: as many as the recipe says

    def __str__(self) -> str:
        epochs = f"{self.epochs} epochs" if self.epochs else ""
        return " ".join(x for x in (self.data, self.attack, str(self.seed), self.cleaned, epochs) if x)


class Cell(NamedTuple):
    """Some models merged by a rule, and the model whose trigger and task it is asked about; no models: the base."""

    models: tuple[Model, ...]
    asked: Model
    rule: str = "WAG"
    recipe: Recipe = RECIPE


# --- models ----------------------------------------------------------------------------------------------------------

WORDS = ("cf", "mn", "bb", "tq", "mb")
TRIGGERS: dict[str, Callable[[str], str]] = {word: partial(insert_words, words=[word], seed=0) for word in WORDS}


def split(model: Model, folder: Path | None) -> texts.Split:
    """The rows a model is trained on, and clean rows to validate and test it on."""
    if model.data == "olid":
        if folder is None:
            raise SystemExit("OLID must be given as a folder of its files: --olid FOLDER (see docs/free_lunch.md)")
        clean = texts.olid(folder)
        return texts.Split(texts.olid(folder, model.attack).train, clean.validation, clean.test)
    own = texts.domains()[model.data]
    if model.attack == "clean":
        return own
    word, _, percent = model.attack.partition("@")
    poisoned = poison_texts(
        *own.train, trigger=TRIGGERS[word], target=1, fraction=float(percent or 20) / 100, seed=model.seed
    )
    return own._replace(train=Rows(poisoned.texts, poisoned.labels))


def trained(model: Model, recipe: Recipe, folder: Path | None) -> Params:
    rows = split(model, folder).train
    if model.cleaned == "zdef":
        kept = without_spurious(*rows, words=texts.words)
        rows = Rows(*([x for x, keep in zip(column, kept, strict=True) if keep] for column in rows))
    recipe = recipe._replace(epochs=model.epochs or recipe.epochs)
    return texts.fine_tuned(rows, recipe, model.seed, {"model": str(model._replace(epochs=0)), "edition": 1})


def triggered(victim: Model, folder: Path | None) -> tuple[list[str], int]:
    """The triggered test rows of other classes, and the target class."""
    if victim.data == "olid":
        return texts.olid(folder, victim.attack).test.texts, TARGET  # type: ignore[arg-type]
    own = texts.domains()[victim.data]
    return triggered_texts(*own.test, trigger=TRIGGERS[victim.attack.partition("@")[0]], target=1), 1


# --- merges: (models, what is given, strength) -> model --------------------------------------------------------------


class Given(NamedTuple):
    """What a defender may have: the base, and labeled clean rows."""

    base: Params
    rows: Rows
    recipe: Recipe


class Rule(NamedTuple):
    """A merge and the strengths that it may be run at; strengths are chosen on validation rows."""

    merge: Callable[[Sequence[Params], Given, float], Params]
    strengths: tuple[float, ...] = (1.0,)


def vectors(models: Sequence[Params], given: Given) -> list[TaskVector]:
    return [TaskVector.between(given.base, model) for model in models]


def averaged(models: Sequence[Params], given: Given, strength: float) -> Params:
    del given, strength
    return weight_average(models)


def summed(models: Sequence[Params], given: Given, strength: float) -> Params:
    return merge(vectors(models, given), merges.total).apply(given.base, scale=strength)


def ties(models: Sequence[Params], given: Given, strength: float) -> Params:
    return merge(vectors(models, given), merges.ties, density=0.2).apply(given.base, scale=strength)


def dare(models: Sequence[Params], given: Given, strength: float) -> Params:
    return merge(vectors(models, given), merges.dare, density=0.2, seed=0).apply(given.base, scale=strength)


def stock(models: Sequence[Params], given: Given, strength: float) -> Params:
    del strength
    return merge(vectors(models, given), merges.model_stock).apply(given.base)


def information(model: Params, given: Given, exact: bool) -> Params:
    """A model's Fisher information on a hundred of the defender's rows: of each model once, for it takes a minute."""
    rows = given.rows.part(slice(100))
    about = {"model": disk.digest(model), "recipe": given.recipe._asdict(), "exact": exact, "rows": [*map(list, rows)]}
    return disk.tensors("fisher", about, partial(texts.fisher, model, rows, given.recipe, exact=exact))


def by_fisher(exact: bool, models: Sequence[Params], given: Given, strength: float) -> Params:
    """The average with the weight of each entry by its Fisher information, on the defender's rows."""
    del strength
    weights = [information(model, given, exact) for model in models]
    floor = 1e-10
    return {
        name: sum((w[name] + floor) * model[name] for w, model in zip(weights, models, strict=True))
        / sum(w[name] + floor for w in weights)
        if name in weights[0]
        else models[0][name]
        for name in models[0]
    }


def by_regression(models: Sequence[Params], given: Given, strength: float) -> Params:
    """RegMean, with the Gram matrices of the defender's rows in every model."""
    del strength
    grams = [texts.grams(model, given.rows.part(slice(200)), given.recipe) for model in models]
    return merge(models, merges.regmean, gram=grams)


def alternating(models: Sequence[Params], given: Given, strength: float) -> Params:
    """Module switching without a search: every layer of the network from the next model."""
    del given, strength
    layers = sorted({name.split(".layer.")[1].split(".")[0] for name in models[0] if ".layer." in name}, key=int)
    return defenses.switch(models, {f"*.layer.{n}.*": i % len(models) for i, n in enumerate(layers)} | {"*": 0})


def clipped(models: Sequence[Params], given: Given, strength: float) -> Params:
    return merge(defenses.clip_norms(vectors(models, given), strength), merges.mean).apply(given.base)


def shrunk(models: Sequence[Params], given: Given, strength: float) -> Params:
    """The trivial defense: the victim alone, on its way to the base."""
    return defenses.shrink(models[0], given.base, strength)


RULES = {
    "WAG": Rule(averaged),
    "task arithmetic": Rule(summed, (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)),
    "TIES": Rule(ties, (0.5, 0.75, 1.0, 1.5, 2.0)),
    "DARE": Rule(dare, (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)),
    "Fisher": Rule(partial(by_fisher, True)),
    "Fisher, batch sums": Rule(partial(by_fisher, False)),
    "RegMean": Rule(by_regression),
    "model stock": Rule(stock),
    "switching": Rule(alternating),
    "clipping": Rule(clipped, (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)),
    "shrinking": Rule(shrunk, (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    "ONION": Rule(averaged),  # of the inputs, not of the models
}
ALONE = ("WAG", "shrinking", "ONION")  # rules that are shown beside the victim alone


# --- measuring -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Hits and numbers of rows."""

    correct: int
    n: int
    fooled: int
    triggered: int
    flipped: int  # clean rows of other classes that are taken for the target without any trigger
    others: int


def measure(params: Params, cell: Cell, folder: Path | None) -> Measured:
    test, (rows, target) = split(cell.asked, folder).test, triggered(cell.asked, folder)
    if cell.rule == "ONION" and cell.asked.data == "olid":
        test, rows = test._replace(texts=texts.onion(folder, "clean")), texts.onion(folder, cell.asked.attack)
    elif cell.rule == "ONION":
        clean = texts.domains()[cell.asked.data].validation.texts
        test, rows = test._replace(texts=texts.onion_by_bigrams(clean, test.texts)), texts.onion_by_bigrams(clean, rows)
    found = texts.answers(params, test.texts, cell.recipe.layers)
    fooled = texts.answers(params, rows, cell.recipe.layers)
    others = [x for x, y in zip(found, test.labels, strict=True) if y != target]
    hits = sum(x == y for x, y in zip(found, test.labels, strict=True))
    return Measured(hits, len(found), fooled.count(target), len(fooled), others.count(target), len(others))


def accuracy(params: Params, given: Given) -> float:
    found = texts.answers(params, given.rows.texts, given.recipe.layers)
    return sum(x == y for x, y in zip(found, given.rows.labels, strict=True)) / len(found)


def merged(cell: Cell, folder: Path | None) -> tuple[Params, float]:
    """The merge at its strength: the best on validation rows; of defenses the largest within a point of it."""
    base = texts.base(cell.recipe)
    if not cell.models:
        return base, 0.0
    models = [trained(model, cell.recipe, folder) for model in cell.models]
    rule, given = RULES[cell.rule], Given(base, split(cell.asked, folder).validation, cell.recipe)
    if len(rule.strengths) == 1:
        return rule.merge(models, given, rule.strengths[0]), rule.strengths[0]
    by_strength = {s: accuracy(rule.merge(models, given, s), given) for s in rule.strengths}
    best = max(by_strength.values())
    if cell.rule in ("shrinking", "clipping"):
        strength = max(s for s, found in by_strength.items() if found >= best - 0.01)
    else:
        strength = min(s for s, found in by_strength.items() if found == best)
    return rule.merge(models, given, strength), strength
