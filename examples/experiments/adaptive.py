"""Attackers who know the detector: what does it cost them to be seen less?

    python examples/experiments/adaptive.py --quick     one world, one target
    python examples/experiments/adaptive.py             3 worlds, two targets
    python examples/experiments/adaptive.py --tables    what is there
    python examples/experiments/adaptive.py --redraw    the picture

Each attacker adds to its loss, with a penalty that is swept, what the defender looks at: the coefficients on a bank of
its own or, in the worst case, on the defender's; the norm and the spectrum of its vector; or all. Two more share one
backdoor, hidden by noise that cancels in their sum. What is seen of them stands beside what is seen of the detector's
clean contributors of the same world (detector.py).
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from statistics import fmean
from typing import Any, NamedTuple, get_args

import torch

import detector
from bench import cells, command, data, evading, pictures, second, zoo
from bench.evading import Evader, Kind
from bench.merges import RULES
from bench.report import text_table
from bench.second import Job, World
from bench.second_measures import TESTED, fooled, hits
from bench.zoo import workforce
from detector import MERGES, STEALTHY, TARGETS, TASK
from taskvec import TaskVector, defenses
from taskvec.metrics import estimate

ROWS = cells.FOLDER / "adaptive.jsonl"
WORLDS = detector.WORLDS[:3]
PENALTIES: dict[Kind, tuple[float, ...]] = {
    "bank": (30.0, 300.0, 3000.0),
    "weights": (1.0, 10.0, 100.0),
    "both": (1.0, 10.0, 100.0),
    "their bank": (30.0, 300.0, 3000.0),
    "all": (1.0, 10.0, 100.0),
}
PARTNER = "mnist"  # the task of the contributor who has the other half
SEEN = ("bank", "leading", "norm")
STATISTICS = {"bank": "the bank", "leading": "the spectrum", "best": "the best of three"}
KINDS = {
    "none": "hides nothing",
    "bank": "from a bank of its own",
    "weights": "from norm and spectrum",
    "both": "from both",
    "their bank": "from the defender's bank",
    "all": "from that, norm and spectrum",
    "halves": "two with half of it each",
    "one half": "one of them alone",
}


class Case(NamedTuple):
    """One attacker in a merge: what it hides from, and the penalty; "halves" are two who share a backdoor."""

    world: World
    target: int
    kind: str = "none"
    penalty: float = 0.0


def cases(worlds: Sequence[World] = WORLDS, targets: Sequence[int] = TARGETS) -> list[Case]:
    """Those who hide nothing first."""
    ways = [
        ("none", 0.0),
        *((k, p) for k, sweep in PENALTIES.items() for p in sweep),
        ("halves", 0.0),
        ("one half", 0.0),
    ]
    return [Case(world, target, *way) for way in ways for world, target in product(worlds, targets)]


def job_of(case: Case) -> Job:
    return Job(case.world, TASK, attack=STEALTHY, target=case.target)


def evader_of(case: Case) -> Evader | None:
    """The attacker, if it trains against what is seen of it."""
    return Evader(job_of(case), case.kind, case.penalty) if case.kind in get_args(Kind) else None


def vectors_of(case: Case) -> dict[str, TaskVector]:
    """All contributors of the merge."""
    found = {task: second.vector(job) for task, job in second.contributors(case.world).items()}
    job, evader = job_of(case), evader_of(case)
    if evader is not None:
        found[TASK] = TaskVector.between(zoo.base(case.world.setting), evading.model(evader))
    elif case.kind == "none":
        found[TASK] = second.vector(job)
    else:
        own, other = evading.halves(job, second.contributors(case.world)[PARTNER])
        found[TASK] = own
        if case.kind == "halves":
            found[PARTNER] = other
    return found


def seen_of(world: World, vectors: Mapping[str, TaskVector]) -> dict[str, dict[str, float]]:
    """What the defender sees of each contributor: statistic -> contributor -> value."""
    scores = detector.scores_by(world, list(vectors.values()))
    alone = defenses.screen(vectors.values())
    return {
        "bank": {name: max(row.values()) for name, row in zip(vectors, scores, strict=True)},
        "leading": {name: one.leading for name, one in zip(vectors, alone, strict=True)},
        "norm": {name: one.norm for name, one in zip(vectors, alone, strict=True)},
    }


def measured(case: Case) -> dict[str, Any]:
    """What is seen of the contributors and of the sums of two, and what the undefended merge does."""
    world, job, vectors = case.world, job_of(case), vectors_of(case)
    pairs = {f"{a} + {b}": vectors[a] + vectors[b] for a, b in combinations(vectors, 2)}
    merged = {
        name: RULES[name].merge(list(vectors.values())).apply(zoo.base(world.setting), RULES[name].scale)
        for name in MERGES
    }
    tested = data.test(TASK).take(slice(TESTED[True]))
    return {
        "alone": seen_of(world, vectors),
        "pairs": seen_of(world, pairs),
        "asr": {name: fooled(job, params) for name, params in merged.items()},
        "right": {name: hits(world, params, tested, TASK) for name, params in merged.items()},
    }


def key_of(case: Case) -> str:
    told = {
        "job": second.told(job_of(case)),
        "others": [second.told(job) for job in second.contributors(case.world).values()],
        "bank": [second.told(job) for job in second.bank(case.world, TASK).values()],
        "kind": case.kind,
        "penalty": case.penalty,
        "partner": PARTNER,
        "merges": list(MERGES),
        "code": [cells.code_of(f) for f in (second.model, evading.model, measured)],
    }
    return cells.key(told)


def fill(case: Case) -> None:
    cells.append(ROWS, key_of(case), [case.world.seed, case.target, case.kind, str(case.penalty)], measured(case))


# --- what came of it -------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A kind of attacker at one penalty, in the mean over worlds and targets; rates in per cent.

    Attributes:
        beaten: statistic -> the share of the world's clean contributors that are seen at least as well.
        lowest: the same of the statistic that tells best: what the defender's false alarms must be to find it.
    """

    kind: str
    penalty: float
    asr: dict[str, list[float]]
    right: dict[str, list[float]]
    beaten: dict[str, float]
    lowest: float


Rows = Mapping[Case, Mapping[str, Any]]
Clean = Mapping[World, Mapping[str, Sequence[float]]]
"""world -> statistic -> its value for each clean contributor."""


def clean_values(worlds: Sequence[World]) -> dict[World, dict[str, list[float]]]:
    """What the detector has seen of a world's clean contributors, where its rows are there."""
    kept = cells.read(cells.FOLDER / detector.TABLE)
    found: dict[World, dict[str, list[float]]] = {}
    for world in worlds:
        asked = [case for case in detector.cases([world]) if not case.attack]
        rows = [kept[key] for case in asked if (key := detector.key_of(case)) in kept]
        if len(rows) == len(asked):
            found[world] = {name: [x for row in rows for x in row[name].values()] for name in SEEN}
    return found


def beaten(value: float, clean: Sequence[float]) -> float:
    """The share of clean values that are at least as high, per cent."""
    return 100 * fmean(other >= value for other in clean)


def shown(rows: Rows, clean: Clean) -> list[Shown]:
    """One line for each kind and penalty."""
    found: list[Shown] = []
    for kind, penalty in dict.fromkeys((case.kind, case.penalty) for case in rows):
        own = {c: row for c, row in rows.items() if (c.kind, c.penalty) == (kind, penalty) and c.world in clean}
        if not own:
            continue
        shares = {n: [beaten(r["alone"][n][TASK], clean[c.world][n]) for c, r in own.items()] for n in SEEN}
        rates = {
            what: {m: [100 * r[what][m][0] / r[what][m][1] for r in own.values()] for m in MERGES}
            for what in ("asr", "right")
        }
        lowest = fmean(min(one) for one in zip(*shares.values(), strict=True))
        found.append(
            Shown(kind, penalty, rates["asr"], rates["right"], {n: fmean(x) for n, x in shares.items()}, lowest)
        )
    return found


def table(found: Sequence[Shown], worlds: int) -> str:
    """The lines as text."""
    body = [
        [
            one.kind,
            f"{one.penalty:g}" if one.penalty else "",
            *(estimate(one.asr[m]) for m in MERGES),
            *(f"{fmean(one.right[m]):.1f}" for m in MERGES),
            *(f"{one.beaten[name]:.0f}" for name in SEEN),
            f"{one.lowest:.0f}",
        ]
        for one in found
    ]
    header = ["hides", "penalty", *(f"ASR, {m}" for m in MERGES), *(f"accuracy, {m}" for m in MERGES), *SEEN, "best"]
    title = (
        f"{TASK}, {worlds} worlds, {len(TARGETS)} targets: per cent, +- a 95 % t interval over models;\n"
        "of the world's clean contributors, so many are seen at least as well, by each statistic and by the best"
    )
    return text_table(title, header, body)


def pairs_table(rows: Rows) -> str:
    """How the sum of two who share a backdoor ranks among the sums of all pairs."""
    body: list[list[object]] = []
    sums = f"{PARTNER} + {TASK}" if data.TASKS.index(PARTNER) < data.TASKS.index(TASK) else f"{TASK} + {PARTNER}"
    own = [row["pairs"] for case, row in rows.items() if case.kind == "halves"]
    for name in SEEN:
        ranks = [1 + sum(x > row[name][sums] for x in row[name].values()) for row in own]
        body.append([name, sum(rank == 1 for rank in ranks), len(ranks), f"{fmean(ranks):.1f}"])
    return text_table(
        "Two who share a backdoor: the rank of their sum among the sums of all ten pairs",
        ["statistic", "first", "of", "mean rank"],
        body,
    )


def frontier_of(found: Sequence[Shown]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The lines of the picture: for each merge and statistic each kind, from no penalty on."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for merge, seen in product(MERGES, STATISTICS):
        points = {
            (one.kind, one.penalty): (one.lowest if seen == "best" else one.beaten[seen], fmean(one.asr[merge]))
            for one in found
        }
        lines = {"none": [points["none", 0.0]]}
        for (kind, _), xy in points.items():
            if kind != "none":
                lines.setdefault(kind, lines["none"][:] if kind in PENALTIES else []).append(xy)
        series[f"{merge}: {STATISTICS[seen]}"] = {KINDS[kind]: line for kind, line in lines.items()}
    return series


def kept_rows(wanted: Sequence[Case]) -> dict[Case, Any]:
    kept = cells.read(ROWS)
    return {case: kept[key] for case in wanted if (key := key_of(case)) in kept}


def kept_tables(wanted: Sequence[Case]) -> str:
    """The tables of all rows that there are of some cases, in worlds that the detector has seen."""
    rows, clean = kept_rows(wanted), clean_values(WORLDS)
    found = shown(rows, clean)
    if not found:
        return "there are no rows yet; detector.py must have run the same worlds"
    return f"{table(found, len({case.world for case in rows if case.world in clean}))}\n{pairs_table(rows)}"


def train(todo: Sequence[Case], workers: int) -> None:
    """What some cases need, and the cases."""
    worlds = list(dict.fromkeys(case.world for case in todo))
    evaders = [one for case in todo if (one := evader_of(case)) is not None]
    jobs = [
        job for world in worlds for job in [*second.contributors(world).values(), *second.bank(world, TASK).values()]
    ]
    jobs += [job.twin() for world in worlds for job in second.bank(world, TASK).values()]
    jobs += [job_of(case) for case in todo] + [job for one in evaders for job in evading.needed(one)]
    with workforce(workers) as pool:
        second.train_all(pool, jobs)
        zoo.at_once(pool, "evaders", evading.model, dict.fromkeys(evaders))
        zoo.at_once(pool, "merges", fill, todo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one world, one target")
    parser.add_argument("--worlds", type=int, default=len(WORLDS), help="so many of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print what is there, measure nothing")
    given = command.can_redraw(parser).parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    wanted = cases(WORLDS[:1], TARGETS[:1]) if given.quick else cases(WORLDS[: given.worlds])
    kept = kept_rows(wanted)
    todo = [case for case in wanted if case not in kept]
    if todo and not (given.tables or given.redraw):
        train(todo, given.workers)
    if given.redraw:
        found = shown(kept_rows(wanted), clean_values(WORLDS))
        pictures.frontier(cells.FOLDER.parents[2] / "docs" / "images" / "adaptive.png", frontier_of(found))
        return
    print(kept_tables(wanted))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
