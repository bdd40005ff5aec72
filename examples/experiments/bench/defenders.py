"""The defenses of the study, each with what it is given, and the defender's own models.

A defense is a function of a scene and a strength to the defended merge. The defender's models come from the half of the
data that no contributor has, with seeds from 100 on: no trigger, clean twin, seed or row is shared with an attack.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taskvec import BackdoorVector, TaskVector, defenses, merge
from taskvec.merges import mean
from taskvec.metrics import by_layer

from . import attackers, data, zoo
from . import cache as disk
from .attackers import Plan
from .encoders import features
from .heads import logits
from .merges import Rule
from .training import Params, train
from .zoo import Recipe, Setting

ROWS: zoo.Rows = "defender"
SEED = 100  # of the defender's first model
PROBE_CLASSES = (3, 5, 7)  # of the simple probes; attacks aim at others


class Bank(NamedTuple):
    """What a bank of probes is made of, one probe for every class of the tasks and every place.

    Attributes:
        tasks: of whose classes and images they are.
        rows: the defender's half, or a few images a class of it.
        places: of the probes' patches: size and place.
    """

    tasks: tuple[str, ...] = data.TASKS
    rows: zoo.Rows = ROWS
    places: tuple[tuple[int, str], ...] = ((7, "bottom-right"),)

    def plans(self) -> dict[tuple[str, int], list[Plan]]:
        """(task, class) -> a plan for every place."""
        return {
            (task, target): [attackers.probe(task, target, SEED, self.rows, size, place) for size, place in self.places]
            for task in self.tasks
            for target in range(len(data.CLASSES[task]))
        }


class Scene(NamedTuple):
    """A merge to defend.

    Attributes:
        setting: the encoder's.
        task: the attacked one; the defender has data of it, and does not know that it is attacked.
        vectors: task -> the contributor's task vector.
        rule: of the merge.
        whole: the undefended merge.
        found: what the bank says of the contributors, see `found`.
        planted: what the attackers added; for oracles alone.
    """

    setting: Setting
    task: str
    vectors: Mapping[str, TaskVector]
    rule: Rule
    whole: Params
    found: Mapping[str, Sequence[BackdoorVector]]
    planted: TaskVector


class Defence(NamedTuple):
    """What is done to a scene, what it takes, and how strongly it may be done."""

    given: str
    defend: Callable[[Any, float], Mapping[str, Tensor]]
    strengths: tuple[float, ...] = ()


def merged(setting: Setting, rule: Rule, vectors: Mapping[str, TaskVector]) -> Params:
    """The contributors' merge."""
    return dict(rule.merge(list(vectors.values())).apply(zoo.base(setting), rule.scale))


def instead(scene: Scene, changed: Mapping[str, TaskVector]) -> Params:
    """The merge, with some contributors' vectors replaced."""
    return merged(scene.setting, scene.rule, {**scene.vectors, **changed})


# --- the defender's own models ---------------------------------------------------------------------------------------


@cache
def probes(setting: Setting, task: str) -> tuple[BackdoorVector, ...]:
    """Backdoors of simple triggers, each with its own class, seed and clean twin."""
    triggers = (("solid", 5, "top-left"), ("random", 5, "top-right"), ("solid", 3, "bottom-left"))
    made = []
    for i, ((kind, size, place), target) in enumerate(zip(triggers, PROBE_CLASSES, strict=True)):
        recipe = Recipe(task, SEED + i, ROWS, zoo.Trigger(kind, size, place, SEED + i), target)
        clean, backdoored = zoo.fine_tuned(setting, recipe.twin()), zoo.fine_tuned(setting, recipe)
        made.append(BackdoorVector.between(clean=clean, backdoored=backdoored, pretrained=zoo.base(setting)))
    return tuple(made)


@cache
def bank(setting: Setting, of: Bank) -> dict[tuple[str, int], list[BackdoorVector]]:
    """The attack's own recipe, once for every class and place."""
    return {label: [attackers.backdoor_vector(setting, plan) for plan in plans] for label, plans in of.plans().items()}


@cache
def clean_models(setting: Setting, task: str, count: int) -> tuple[Params, ...]:
    """Clean fine-tunes of the attacked task."""
    return tuple(zoo.fine_tuned(setting, Recipe(task, SEED + i, ROWS)) for i in range(count))


def robust(setting: Setting, task: str, *, epsilon: float = 16 / 255, moves: int = 5) -> Params:
    """An adversarially trained fine-tune: projected gradient descent on every batch."""
    settings: dict[str, disk.Json] = {"setting": zoo.settings(setting), "task": task, "rows": ROWS}
    settings |= {"seed": SEED, "epsilon": epsilon, "moves": moves}
    return disk.tensors("robust", settings, partial(_robust, setting, task, epsilon, moves))


def _robust(setting: Setting, task: str, epsilon: float, moves: int) -> Params:
    study, head = zoo.architecture(setting), zoo.head(setting, task)

    def loss(params: Mapping[str, Tensor], batch: data.Split, _step: int) -> Tensor:
        def error(images: Tensor) -> Tensor:
            return F.cross_entropy(logits(features(study.module, params, images), head), batch.labels)

        change = torch.zeros_like(batch.images)
        for _ in range(moves):
            change.requires_grad_()
            (slope,) = torch.autograd.grad(error(batch.images + change), [change])
            change = (change.detach() + epsilon / 2 * slope.sign()).clamp(-epsilon, epsilon)
            change = (batch.images + change).clamp(0, 1) - batch.images
        return error(batch.images + change)

    batches = data.batches(zoo.rows_of(task, ROWS), 64, SEED)
    return train(zoo.base(setting), loss, batches, lr=study.lr, steps=setting.steps)


# --- what is done ----------------------------------------------------------------------------------------------------


def undefended(scene: Scene, _by: float) -> Params:
    return scene.whole


def subtracting(scene: Scene, by: float, *, vector: Callable[[Scene], BackdoorVector]) -> Params:
    return dict(defenses.injection_subtraction(scene.whole, vector(scene), by))


def consensus(scene: Scene, by: float) -> Params:
    return dict(defenses.consensus_subtraction(scene.whole, probes(scene.setting, scene.task), by, agree=1.0))


def projection(scene: Scene, by: float) -> Params:
    own = probes(scene.setting, scene.task)
    return dict(defenses.project_out(scene.whole, zoo.base(scene.setting), own, by))


def prototype(scene: Scene, by: float) -> Params:
    own = probes(scene.setting, scene.task)
    return dict(defenses.purify(scene.whole, zoo.base(scene.setting), own, energy=by))


def robustness(scene: Scene, by: float) -> Params:
    (clean,) = clean_models(scene.setting, scene.task, 1)
    return dict(defenses.harden(scene.whole, clean, robust(scene.setting, scene.task), by))


def clipping(scene: Scene, by: float) -> Params:
    own = list(scene.vectors.values())
    clipped = defenses.clip_norms(own, 1 / (1 - by))  # at (1 - by) times the median norm
    return instead(scene, dict(zip(scene.vectors, clipped, strict=True)))


def mixing(scene: Scene, by: float) -> Params:
    return dict(defenses.mix(scene.whole, zoo.base(scene.setting), 1 - by, seed=SEED))


def shrinking(scene: Scene, by: float) -> Params:
    return dict(defenses.shrink(scene.whole, zoo.base(scene.setting), by))


def averaging(scene: Scene, _by: float, *, count: int) -> Params:
    base, suspect = zoo.base(scene.setting), scene.vectors[scene.task]
    clean = [TaskVector.between(base, model) for model in clean_models(scene.setting, scene.task, count)]
    return instead(scene, {scene.task: merge([suspect, *clean], mean)})


def switching(scene: Scene, _by: float) -> Params:
    """Every second layer of the contributor from a clean fine-tune of the same task."""
    base, (clean,) = zoo.base(scene.setting), clean_models(scene.setting, scene.task, 1)
    suspect = dict(scene.vectors[scene.task].apply(base))
    layers = by_layer(lambda parts: list(parts[0]), [scene.vectors[scene.task]])
    taken = {name: i % 2 for i, names in enumerate(layers.values()) for name in names}
    switched = defenses.switch([suspect, clean], {**taken, "*": 0})
    return instead(scene, {scene.task: TaskVector.between(base, switched)})


def found(
    own: Mapping[tuple[str, int], Sequence[BackdoorVector]], vectors: Mapping[str, TaskVector]
) -> dict[str, list[BackdoorVector]]:
    """The contributors that a bank flags, and its probes of the classes that they are flagged for."""
    tasks = list(vectors)
    flags = defenses.flagged(defenses.bank_scores(vectors.values(), own))
    probes_of: dict[str, list[BackdoorVector]] = {}
    for flag in flags:
        probes_of.setdefault(tasks[flag.contributor], []).extend(own[flag.label])
    return probes_of


def leaving_out(scene: Scene, by: float) -> Params:
    """Ours: flagged contributors count less, by 1 not at all; then the merge shrinks, by what is beyond 1."""
    whole = instead(scene, {task: scene.vectors[task] * (1 - min(by, 1)) for task in scene.found})
    return dict(defenses.shrink(whole, zoo.base(scene.setting), max(by - 1, 0)))


def disarmed(vectors: Mapping[str, TaskVector], found: Mapping[str, Sequence[BackdoorVector]]) -> dict[str, TaskVector]:
    """The contributors, where the flagged ones have lost what agrees with the probes."""
    return {**vectors} | {task: defenses.disarm(vectors[task], own) for task, own in found.items()}


def disarming(scene: Scene, by: float) -> Params:
    """Ours, milder: flagged contributors are disarmed; then the merge shrinks, by what is beyond 1."""
    whole = instead(scene, disarmed(scene.vectors, scene.found))
    return dict(defenses.shrink(whole, zoo.base(scene.setting), by - 1))


def disarming_and_clipping(scene: Scene, by: float) -> Params:
    """Ours, with norm clipping in the place of shrinking: flagged contributors are disarmed, then all are clipped."""
    return clipping(scene._replace(vectors=disarmed(scene.vectors, scene.found)), by - 1)


def oracle(scene: Scene, by: float) -> Params:
    """What the attackers added is subtracted from the contributors."""
    return dict((-scene.planted).apply(scene.whole, by))


def first_probe(scene: Scene) -> BackdoorVector:
    return probes(scene.setting, scene.task)[0]


def random_draw(scene: Scene, draw: int) -> BackdoorVector:
    return defenses.random_twin(first_probe(scene), seed=draw)


def shuffled(scene: Scene) -> BackdoorVector:
    return defenses.shuffled_twin(first_probe(scene), seed=0)


SHRINKS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
DISARMS = (1.0, *(1 + by for by in SHRINKS))
SCALES = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
HALF = "half of the task's data, labelled"
DEFENCES: dict[str, Defence] = {
    "none": Defence("nothing", undefended),
    "IBVS": Defence(HALF, partial(subtracting, vector=first_probe), SCALES),
    "consensus": Defence(HALF, consensus, (0.2, 0.4, 0.8, 1.2, 2.0, 3.0)),
    "projection": Defence(HALF, projection, (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)),
    "prototype": Defence(HALF, prototype, (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)),
    "robustness vector": Defence(HALF, robustness, SCALES),
    "clipping": Defence("nothing", clipping, SHRINKS),
    "mixing": Defence("the base", mixing, SHRINKS),
    "shrinking": Defence("the base", shrinking, SHRINKS),
    "ours": Defence("half of all tasks' data, labelled", leaving_out, (0.5, 1.0, *(1 + by for by in SHRINKS))),
    "ours, disarming": Defence("half of all tasks' data, labelled", disarming, DISARMS),
    "ours, clipping": Defence("half of all tasks' data, labelled", disarming_and_clipping, DISARMS),
    "switching": Defence("1 clean model of the task", switching),
    "WAG + 2": Defence("2 clean models of the task", partial(averaging, count=2)),
    "WAG + 4": Defence("4 clean models of the task", partial(averaging, count=4)),
    "oracle": Defence("the attack's own vector", oracle, (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)),
}
TWINS: dict[str, list[Callable[[Scene], BackdoorVector]]] = {
    "random vector": [partial(random_draw, draw=draw) for draw in range(5)],
    "shuffled probe": [shuffled],
}
