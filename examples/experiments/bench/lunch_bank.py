"""The bank of probes on text: does it tell a victim from clean models of the same task, and what does it save?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from taskvec import BackdoorVector, TaskVector, defenses, merge, merges
from taskvec.attacks import poison_texts

from . import lunch, texts
from .lunch import TRIGGERS, Cell, Model, Params
from .texts import Recipe, Rows

PROBE = "mb"  # the defender's rare word
SHARE = 0.5  # of the rows of the other class, which get it
EPOCHS = 12  # the defender has few rows
CLASSES = (0, 1)
TARGET = 1  # of the attacks on sentiment


class Case(NamedTuple):
    """Models of one task that are averaged, the first of them in doubt, and the attack that is asked about."""

    models: tuple[Model, ...]
    asked: Model
    recipe: Recipe


class Probe(NamedTuple):
    """A defender's fine-tune: on their few rows, with their word for a class or (None) clean."""

    data: str
    target: int | None
    seed: int


def probes_of(case: Case) -> list[Probe]:
    """The clean twin of a defender's probes, and a probe of each class."""
    return [Probe(case.asked.data, target, case.asked.seed) for target in (None, *CLASSES)]


def probe_model(probe: Probe, recipe: Recipe) -> Params:
    """A defender's fine-tune; the rows are the validation rows."""
    rows = texts.domains()[probe.data].validation
    if probe.target is not None:
        how = {"trigger": TRIGGERS[PROBE], "target": probe.target, "fraction": SHARE, "seed": probe.seed}
        found = poison_texts(*rows, **how)
        rows = Rows(found.texts, found.labels)
    about = {"probe": [probe.data, probe.target], "word": PROBE, "share": SHARE, "edition": 1}
    return texts.fine_tuned(rows, recipe._replace(epochs=EPOCHS), 500 + probe.seed, about)


def bank(case: Case) -> dict[int, list[BackdoorVector]]:
    """Class -> a probe, from the clean twin to the poisoned fine-tune."""
    base = texts.base(case.recipe)
    twin, *poisoned = (probe_model(probe, case.recipe) for probe in probes_of(case))
    vectors = [BackdoorVector.between(clean=twin, backdoored=own, pretrained=base) for own in poisoned]
    return {c: [own] for c, own in zip(CLASSES, vectors, strict=True)}


def measured(case: Case) -> dict[str, Any]:
    """The bank's scores of every model, and what each defense leaves of the attack and of the accuracy."""
    base = texts.base(case.recipe)
    vectors = [TaskVector.between(base, lunch.trained(model, case.recipe, None)) for model in case.models]
    probes = bank(case)
    scores = defenses.bank_scores(vectors, probes)
    highest = defenses.flagged(scores, 1e-9)[0]
    disarmed = defenses.disarm(vectors[highest.contributor], probes[highest.label], 1.0)
    merged = {
        "average": vectors,
        "highest left out": [v for i, v in enumerate(vectors) if i != highest.contributor],
        "highest disarmed": [disarmed if i == highest.contributor else v for i, v in enumerate(vectors)],
        "in doubt left out": vectors[1:],  # by one who knows
    }
    return {
        "scores": [[row[c] for c in CLASSES] for row in scores],
        "highest": [highest.contributor, highest.label, highest.deviation],
        "spectrum": [found.leading for found in defenses.screen(vectors)],
        "merges": {name: _asked(own, base, case) for name, own in merged.items()},
        "probe": _probe_asr(case),
    }


def _asked(vectors: Sequence[TaskVector], base: Params, case: Case) -> Mapping[str, int]:
    model = merge(vectors, merges.mean).apply(base)
    return lunch.measure(model, Cell((), case.asked, recipe=case.recipe), None)._asdict()


def _probe_asr(case: Case) -> list[int]:
    """Whether the defender's own backdoors work: hits and rows of the probe for the attack's class, its own word."""
    probe = probe_model(Probe(case.asked.data, TARGET, case.asked.seed), case.recipe)
    rows, _ = lunch.triggered(case.asked._replace(attack=PROBE), None)
    return [texts.answers(probe, rows, case.recipe.layers).count(TARGET), len(rows)]
