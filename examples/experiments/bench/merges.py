"""The merges that BadMerging is measured on: contributors' models in, a model to ask out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taskvec import TaskVector, merge
from taskvec.calibration import adamerging, linear_grams, surgery
from taskvec.merges import dare, mean, regmean, ties, total

from . import cache, data, zoo
from .asking import Model, model
from .attackers import embed, head_of
from .zoo import Setting

STATISTICS = 256  # validation images a task for RegMean's Gram matrices
# Of AdaMerging, and twice as many of surgery, at 1e-2. The paper's 500 at 1e-3 take eight times as long; in the one
# case tried (vits, BadMerging-on) they left the attack 42 % in place of 30.
STEPS = 60

Contributors = Mapping[str, Mapping[str, Tensor]]
"""Task -> what its contributor handed in."""
Merger = Callable[[Setting, Contributors], Model]


def vectors(setting: Setting, models: Contributors) -> list[TaskVector]:
    """The contributors' task vectors."""
    return [TaskVector.between(zoo.base(setting), params) for params in models.values()]


class Rule(NamedTuple):
    """How task vectors are merged, and the scale that its paper applies the result with."""

    merge: Callable[[Sequence[TaskVector]], TaskVector]
    scale: float


def by(vectors: Sequence[TaskVector], *, rule: Callable[..., Tensor], **options: float) -> TaskVector:
    """The merge of some vectors by a rule."""
    return merge(vectors, rule, **options)


RULES: dict[str, Rule] = {
    "average": Rule(partial(by, rule=mean), 1.0),
    "task arithmetic": Rule(partial(by, rule=total), 0.3),
    "TIES": Rule(partial(by, rule=ties, density=0.2), 1.0),
    "DARE": Rule(partial(by, rule=dare, density=0.2, seed=0), 0.3),
}


def elementwise(rule: Rule) -> Merger:
    """A rule on task vectors, applied to the base at its scale."""

    def combine(setting: Setting, models: Contributors) -> Model:
        return model(rule.merge(vectors(setting, models)).apply(zoo.base(setting), rule.scale))

    return combine


def by_regmean(setting: Setting, models: Contributors) -> Model:
    """Gram matrices from each task's validation images, in the model its contributor handed in."""
    grams = []
    for task, params in models.items():
        own = {name: p.detach() for name, p in params.items()}
        images = data.validation(task).images[:STATISTICS]
        grams.append(linear_grams(partial(embed, setting, own), own, images.split(64)).matrices)
    return model(merge(vectors(setting, models), regmean, gram=grams).apply(zoo.base(setting)))


def by_adamerging(setting: Setting, models: Contributors) -> Model:
    """Layer-wise coefficients by the entropy on unlabelled validation images; kept, since surgery starts from it."""

    def scores(params: Mapping[str, Tensor], images: Tensor, task: str) -> Tensor:
        return head_of(setting, task)(embed(setting, params, images))

    def learn() -> dict[str, Tensor]:
        loaders = {task: partial(_shuffled, task) for task in models}
        return dict(adamerging(scores, zoo.base(setting), vectors(setting, models), loaders, steps=STEPS, lr=1e-2)[0])

    contributors = {task: cache.digest(params) for task, params in models.items()}
    key = {"setting": zoo.settings(setting), "contributors": contributors, "steps": STEPS}
    return model(cache.tensors("adamerging", key, learn))


def with_surgery(merger: Merger) -> Merger:
    """A merge, and for each task an adapter that brings its features back to those of its contributor's model."""

    def combine(setting: Setting, models: Contributors) -> Model:
        merged = merger(setting, models)
        adapters = {
            task: surgery(
                partial(embed, setting, merged.params),
                partial(embed, setting, params),
                partial(_shuffled, task),
                steps=2 * STEPS,
                lr=1e-2,
            )
            for task, params in models.items()
        }
        return model(merged.params, adapters)

    return combine


def _shuffled(task: str) -> Iterator[Tensor]:
    order = torch.randperm(data.VALIDATION, generator=torch.Generator().manual_seed(0))
    return iter(data.validation(task).images[order].split(16))


FAST: dict[str, Merger] = {
    "average": elementwise(RULES["average"]),
    "task arithmetic .3": elementwise(RULES["task arithmetic"]),
    "TIES 20 %, 1": elementwise(RULES["TIES"]),
    "RegMean": by_regmean,
}
SLOW: dict[str, Merger] = {"AdaMerging": by_adamerging, "AdaMerging, surgery": with_surgery(by_adamerging)}
