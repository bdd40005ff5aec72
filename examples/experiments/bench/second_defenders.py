"""The second edition's defenses: functions of a scene and a strength, given no more than they say."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from taskvec import BackdoorVector, TaskVector, defenses, merge
from taskvec.merges import mean
from taskvec.metrics import spectrum

from . import mine
from .defenders import Defence
from .merges import Rule
from .training import Params


class Scene(NamedTuple):
    """A merge to defend.

    Attributes:
        base: the pre-trained model.
        task: the attacked one, which the defender has probes of.
        vectors: task -> the contributor's task vector.
        rule: of the merge.
        probes: class -> the defender's probe.
        found: contributor -> the probes of the classes that it is flagged for.
        suspect: the contributor and the class of the highest score, flagged or not.
        others: clean vectors of the attacked task, for defenses that are given more.
        planted: what the attack added; for the oracle alone.
    """

    base: Params
    task: str
    vectors: Mapping[str, TaskVector]
    rule: Rule
    probes: Mapping[int, BackdoorVector]
    found: Mapping[str, Sequence[BackdoorVector]]
    suspect: tuple[str, int]
    others: Sequence[TaskVector]
    planted: TaskVector


def merged(scene: Scene, changed: Mapping[str, TaskVector] | None = None) -> Params:
    """The merge, with some contributors' vectors replaced."""
    vectors = {**scene.vectors, **(changed or {})}
    return scene.rule.merge(list(vectors.values())).apply(scene.base, scene.rule.scale)


def nothing(scene: Scene, _by: float) -> Params:
    return merged(scene)


def shrinking(scene: Scene, by: float) -> Params:
    return defenses.shrink(merged(scene), scene.base, by)


def clipping(scene: Scene, by: float) -> Params:
    """All contributors at most at (1 - by) times the median norm."""
    if by == 1:
        return scene.base
    clipped = defenses.clip_norms(list(scene.vectors.values()), 1 / (1 - by))
    return merged(scene, dict(zip(scene.vectors, clipped, strict=True)))


def subtracting(scene: Scene, by: float) -> Params:
    """IBVS with the probe of the class that the bank suspects most."""
    return defenses.injection_subtraction(merged(scene), scene.probes[scene.suspect[1]], by)


def subtracting_noise(scene: Scene, by: float) -> Params:
    """Its control: a random vector of the same norm in each tensor."""
    probe = scene.probes[scene.suspect[1]]
    return defenses.injection_subtraction(merged(scene), defenses.random_twin(probe, seed=0), by)


def consensus(scene: Scene, by: float) -> Params:
    """What all probes of the bank agree on."""
    return defenses.consensus_subtraction(merged(scene), list(scene.probes.values()), by, agree=0.8)


def projection(scene: Scene, by: float) -> Params:
    """Without what lies in the span of all probes of the bank."""
    return defenses.project_out(merged(scene), scene.base, scene.probes.values(), by)


def purification(scene: Scene, by: float) -> Params:
    """Without the directions that the merge shares with the bank's prototype, so much of what is shared."""
    return defenses.purify(merged(scene), scene.base, scene.probes.values(), energy=by)


def then_shrinking(change: Callable[[Scene], Mapping[str, TaskVector]], scene: Scene, by: float) -> Params:
    """Contributors changed, then the merge shrunk by what is beyond 1."""
    return defenses.shrink(merged(scene, change(scene)), scene.base, by - 1)


def without_flagged(scene: Scene) -> dict[str, TaskVector]:
    return {task: scene.vectors[task] * 0 for task in scene.found}


def halved(scene: Scene) -> dict[str, TaskVector]:
    return {task: scene.vectors[task] / 2 for task in scene.found}


def disarmed(scene: Scene) -> dict[str, TaskVector]:
    return {task: defenses.disarm(scene.vectors[task], own) for task, own in scene.found.items()}


def disarmed_by_size(scene: Scene) -> dict[str, TaskVector]:
    """No entry loses more than twice what the probes have there."""
    return {task: defenses.disarm(scene.vectors[task], own, 2.0) for task, own in scene.found.items()}


def disarmed_of_a_wrong_class(scene: Scene) -> dict[str, TaskVector]:
    """The control of disarming: the same contributors, the probe of another class."""
    wrong = scene.probes[(scene.suspect[1] + 5) % len(scene.probes)]
    return {task: defenses.disarm(scene.vectors[task], [wrong]) for task in scene.found}


def without_longest(scene: Scene) -> dict[str, TaskVector]:
    longest = max(scene.vectors, key=lambda task: float(scene.vectors[task].norm()))
    return {longest: scene.vectors[longest] * 0}


def without_steepest(scene: Scene) -> dict[str, TaskVector]:
    """Without the contributor whose matrices have the largest share of their energy in one direction."""

    def steepness(v: TaskVector) -> float:
        return fmean(float(s[0].square() / s.square().sum()) for s in spectrum(v).values())

    steepest = max(scene.vectors, key=lambda task: steepness(scene.vectors[task]))
    return {steepest: scene.vectors[steepest] * 0}


def averaged(scene: Scene, *, count: int) -> dict[str, TaskVector]:
    """WAG: the attacked task's contributor with so many clean models of it."""
    return {scene.task: merge([scene.vectors[scene.task], *scene.others[:count]], mean)}


def oracle(scene: Scene, by: float) -> Params:
    return merged(scene, {scene.task: scene.vectors[scene.task] - scene.planted * by})


SHRINKS = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
BEYOND = (1.0, *(1 + by for by in SHRINKS))
SCALES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
# ten labeled images a class of the attacked task, the public head and the attack's recipe
BANK = "a bank of probes"
DEFENCES: dict[str, Defence] = {
    "none": Defence("nothing", nothing, (0.0,)),
    "shrinking": Defence("the base", shrinking, SHRINKS),
    "clipping": Defence("nothing", clipping, SHRINKS),
    "IBVS, the bank's probe": Defence(BANK, subtracting, SCALES),
    "random vector of its norm": Defence("nothing", subtracting_noise, SCALES),
    "consensus of the bank": Defence(BANK, consensus, SCALES),
    "projection, the bank's probes": Defence(BANK, projection, SCALES),
    "purification, the bank's probes": Defence(BANK, purification, (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)),
    "bank: leave out": Defence(BANK, partial(then_shrinking, without_flagged), BEYOND),
    "bank: halve": Defence(BANK, partial(then_shrinking, halved), BEYOND),
    "bank: disarm": Defence(BANK, partial(then_shrinking, disarmed), BEYOND),
    "bank: disarm by size": Defence(BANK, partial(then_shrinking, disarmed_by_size), BEYOND),
    "bank: disarm, wrong class": Defence(BANK, partial(then_shrinking, disarmed_of_a_wrong_class), BEYOND),
    "drop the longest": Defence("the base", partial(then_shrinking, without_longest), BEYOND),
    "drop the steepest": Defence("the base", partial(then_shrinking, without_steepest), BEYOND),
    "WAG + 2": Defence("2 clean models of the task", partial(then_shrinking, partial(averaged, count=2)), BEYOND),
    "WAG + 4": Defence("4 clean models of the task", partial(then_shrinking, partial(averaged, count=4)), BEYOND),
    "oracle": Defence("the attack's own vector", oracle, (0.25, 0.5, 0.75, 1.0)),
}


def defence_of(name: str) -> Defence:
    """One of ours, or one of yours, as `mine.py:trim`."""
    return DEFENCES[name] if name in DEFENCES else mine.yours(name, _whole)


def _whole(scene: Scene) -> tuple[Params, Params]:
    return merged(scene), scene.base
