"""Attackers who know what the defender looks at: they train against it, or share one backdoor between two contributors.

They know the defender's recipe, not their data or seeds: an attacker makes a bank of their own from their own rows. The
worst case is told beside it: an attacker who has the defender's very bank.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from taskvec import BackdoorVector, TaskVector, defenses

from . import cache as disk
from . import data, second, zoo
from .second import PROBE, Attack, Job
from .training import Loss, Params, train

Kind = Literal["bank", "weights", "both", "their bank", "all"]
"""What is kept low: the coefficients on a bank of the attacker's own; norm and spectrum; both; the coefficients on the
defender's bank; those, norm and spectrum."""

OWN = 9  # the draw of what an attacker makes for their own use


class Evader(NamedTuple):
    """An attack whose loss has `penalty` times what the defender looks at."""

    job: Job
    kind: Kind
    penalty: float

    @property
    def attack(self) -> Attack | None:
        """What tells an attack from a clean model, as that of a `Job`."""
        return self.job.attack


def model(evader: Evader) -> Params:
    """The fine-tune, trained once."""
    told = {"job": second.told(evader.job), "kind": evader.kind, "penalty": evader.penalty}
    return disk.tensors("evading", told, partial(_train, evader))


def needed(evader: Evader) -> list[Job]:
    """The models that are made for it: the clean twin, and a bank."""
    bank = bank_of(evader)
    return [evader.job.twin(), *(job.twin() for job in bank[:1]), *bank]


def bank_of(evader: Evader) -> list[Job]:
    """The probes that an attacker looks at."""
    if evader.kind in ("their bank", "all"):
        return list(second.bank(evader.job.world, evader.job.task).values())
    return own_bank(evader.job) if evader.kind in ("bank", "both") else []


def own_bank(job: Job) -> list[Job]:
    """The attacker's own probes, one of each class, by the defender's recipe."""
    return [Job(job.world, job.task, attack=PROBE, target=c, draw=OWN) for c in range(len(data.CLASSES[job.task]))]


def _train(evader: Evader) -> Params:
    job, kind = evader.job, evader.kind
    assert job.attack is not None
    study, base = zoo.architecture(job.world.setting), zoo.base(job.world.setting)
    seen: list[Loss] = []
    if bank := bank_of(evader):
        seen.append(coefficients(base, [second.probe(own) for own in bank]))
    if kind in ("weights", "both", "all"):
        seen.append(unlike(base, second.model(job.twin())))
    attacked = second.attack_loss(job, job.attack)

    def loss(params: Mapping[str, Tensor], batch: data.Split, step: int) -> Tensor:
        return attacked(params, batch, step) + evader.penalty * sum(f(params, batch, step) for f in seen)

    batches = data.batches(second.rows_of(job.world, job.task, job.rows), 64, job.seed)
    return train(base, loss, batches, lr=study.lr * job.rate, steps=job.steps)


# --- what is kept low ------------------------------------------------------------------------------------------------


def coefficients(base: Params, probes: list[BackdoorVector]) -> Loss:
    """The sum of the squared coefficients on some probes."""
    flat = torch.stack([torch.cat([probe[name].flatten() for name in base]) for probe in probes])
    readers = torch.linalg.solve(flat @ flat.T, flat)  # coefficients are `readers @ task vector`

    def loss(params: Mapping[str, Tensor], _batch: data.Split, _step: int) -> Tensor:
        moved = torch.cat([(params[name] - base[name]).flatten() for name in base])
        return (readers @ moved).square().sum()

    return loss


def unlike(base: Params, clean: Params) -> Loss:
    """How far the norm is from that of a clean fine-tune, as a share of it squared, and how much steeper matrices are.

    Steeper: the share of the largest singular value in the squared norm, above the clean one's, in the mean over
    matrices. The largest singular value is followed by one step of the power method at each call.
    """
    names = [name for name in base if base[name].ndim > 1 and min(base[name].flatten(1).shape) > 1]
    planned = {name: float(share(clean[name] - base[name])) for name in names}
    norm = float(TaskVector.between(base, clean).norm())
    directions = {name: torch.ones(base[name].flatten(1).shape[1]) for name in names}

    def loss(params: Mapping[str, Tensor], _batch: data.Split, _step: int) -> Tensor:
        moved = {name: params[name] - base[name] for name in base}
        own = torch.cat([x.flatten() for x in moved.values()]).square().sum().add(1e-12).sqrt()
        steeper: list[Tensor] = []
        for name in names:
            x = moved[name].flatten(1)
            with torch.no_grad():
                found = x.T @ (x @ directions[name])
                directions[name] = found / found.norm().clamp(min=1e-20) if bool(found.any()) else directions[name]
            along = (x @ directions[name]).square().sum() / directions[name].square().sum()
            steeper.append((along / x.square().sum().add(1e-12) - planned[name]).clamp(min=0))
        return (own / norm - 1).square() + torch.stack(steeper).mean()

    return loss


def share(x: Tensor) -> Tensor:
    """The share of the largest singular value in a matrix's squared norm."""
    return torch.linalg.matrix_norm(x.flatten(1), ord=2).square() / x.square().sum()


# --- two who share a backdoor ----------------------------------------------------------------------------------------


def halves(job: Job, partner: Job) -> tuple[TaskVector, TaskVector]:
    """Two contributors, each with half of a backdoor vector, hidden by noise of its norm that cancels in their sum."""
    clean, other = second.vector(job.twin()), second.vector(partner)
    half = (second.vector(job) - clean) * 0.5
    noise = defenses.random_twin(half, seed=job.seed)
    return clean + half + noise, other + half - noise
