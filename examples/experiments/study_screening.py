"""Screening one contributor from its weights alone: what each statistic tells, on vectors that it was not made for.

    python examples/experiments/study_screening.py [--encoder vits] [--quick | --redraw]

Fifty clean contributors and as many backdoored ones of six kinds, ten of each, each beside the clean contributors of
the other tasks. For every statistic the area under its ROC and the true positives at 5 % false positives, kind by kind;
and a logistic regression on all of them that has never seen the kind it is asked about. The bank is the defender's: its
own rows, seeds, triggers and clean twins. Probes of the attacked tasks only.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench import attackers, command, data, defenders, handed, report, zoo
from bench import cache as disk
from bench.progress import progress
from bench.zoo import Setting
from taskvec import TaskVector, plot
from taskvec.defenses import Screening, bank_scores, flagged, screen
from taskvec.metrics import Roc, roc

PICTURES = Path(__file__).parents[2] / "docs" / "images"
ATTACKED = ("mnist", "fashion")
SEEDS, TARGET = (0, 1, 2, 3, 4), 1
MORE_CLEAN = (5, 6, 7, 8, 9)
KINDS = ("BadNets", "blended", "BadMerging-on", "BadMerging-off", "amplified", "against subtraction")
BANK, BANKED = "bank", defenders.Bank(ATTACKED)
STATISTICS = (*Screening._fields, BANK)


class Case(NamedTuple):
    """One contributor to be screened: clean, or of some kind."""

    kind: str
    task: str
    seed: int


def cases(seeds: Sequence[int]) -> list[Case]:
    """Ten backdoored contributors of every kind; the clean ones of all tasks."""
    clean = [Case("clean", task, seed) for seed in (*seeds, *MORE_CLEAN[: len(seeds)]) for task in data.TASKS]
    return clean + [Case(kind, task, seed) for kind in KINDS for task in ATTACKED for seed in seeds]


def statistics(setting: Setting, case: Case) -> dict[str, float]:
    """What screening says of a contributor among the clean ones of the other tasks."""
    base, clean = zoo.base(setting), handed.contributors(setting, case.seed)
    own = handed.ATTACKERS[case.kind](setting, case.task, TARGET, case.seed).models if case.kind != "clean" else {}
    vectors = {task: TaskVector.between(base, model) for task, model in {**clean, **own}.items()}
    place = list(vectors).index(next(iter(own), case.task))  # whoever attacks off-task owns another one
    numbers = screen(vectors.values())[place]._asdict()
    scores = bank_scores(vectors.values(), defenders.bank(setting, BANKED))
    found = flagged(scores)
    return numbers | {
        BANK: max(scores[place].values()),
        "flagged": float(any(flag.contributor == place for flag in found)),
    }


def measured(setting: Setting, case: Case) -> dict[str, float]:
    """The same, remembered."""
    about = {"setting": zoo.settings(setting), "case": case._asdict(), "bank": BANKED._asdict()}
    return disk.values("screening", about, partial(statistics, setting, case))


# --- how well it tells them apart ------------------------------------------------------------------------------------


def by_kind(found: Mapping[Case, Mapping[str, float]], name: str) -> dict[str, list[float]]:
    """A statistic's values, by kind of contributor; how far from the clean mean, where it may go either way."""
    clean = [row[name] for case, row in found.items() if case.kind == "clean"]
    middle = 0.0 if name == BANK else fmean(clean)
    values: dict[str, list[float]] = {}
    for case, row in found.items():
        values.setdefault(case.kind, []).append(row[name] if name == BANK else abs(row[name] - middle))
    return values


def regression(found: Mapping[Case, Mapping[str, float]], left_out: str) -> Roc:
    """Logistic regression on all statistics; half of the clean ones and all other kinds to learn from."""
    clean = [row for case, row in found.items() if case.kind == "clean"]
    known = [row for case, row in found.items() if case.kind not in ("clean", left_out)]
    asked = [row for case, row in found.items() if case.kind == left_out]
    learn = [*clean[::2], *known]
    spread = {name: stdev([row[name] for row in clean[::2]]) or 1.0 for name in STATISTICS}
    middle = {name: fmean(row[name] for row in clean[::2]) for name in STATISTICS}

    def table(rows: Sequence[Mapping[str, float]]) -> torch.Tensor:
        return torch.tensor([[(row[name] - middle[name]) / spread[name] for name in STATISTICS] for row in rows])

    x, y = table(learn), torch.tensor([0.0] * len(clean[::2]) + [1.0] * len(known))
    weights = torch.zeros(len(STATISTICS) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        balance = torch.where(y > 0, 1 / y.sum(), 1 / (1 - y).sum())
        value = F.binary_cross_entropy_with_logits(x @ weights[1:] + weights[0], y, balance, reduction="sum")
        value = value + 0.01 * weights[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        scores = [(table(rows) @ weights[1:]).tolist() for rows in (asked, clean[1::2])]
    return roc(*scores)


def tables(title: str, found: Mapping[Case, Mapping[str, float]]) -> str:
    body = []
    for name in STATISTICS:
        values = by_kind(found, name)
        body.append([name, *(_text(roc(values[kind], values["clean"])) for kind in KINDS)])
    body.append(["all, kind left out", *(_text(regression(found, kind)) for kind in KINDS)])
    counts = {kind: [row["flagged"] for case, row in found.items() if case.kind == kind] for kind in ("clean", *KINDS)}
    flags = [[kind, f"{sum(own):.0f}", len(own)] for kind, own in counts.items()]
    head = f"{title}: area under the ROC / true positives at 5 % false positives"
    return "\n".join(
        [
            report.text_table(head, ["statistic", *KINDS], body),
            report.text_table("Contributors flagged by the bank, at 6 deviations", ["kind", "flagged", "of"], flags),
        ]
    )


def _text(found: Roc) -> str:
    return f"{found.area:.2f} / {found.found:.2f}"


def draw(name: str, found: Mapping[Case, Mapping[str, float]]) -> None:
    """The bank's scores of all contributors, and their norms; a line at the largest value of a clean one."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only here

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {BANK: "Bank: only blended overlaps with clean", "norm": "Norm: plain patches overlap with clean"}
    for axes, (statistic, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        groups: dict[str, list[float]] = {}
        for case, row in found.items():
            groups.setdefault(case.kind, []).append(row[statistic])
        label = "largest score on the bank" if statistic == BANK else "norm over the others' median"
        plot.strip(groups, xlabel=label, axes=axes)
        axes.axvline(max(groups["clean"]), color="black", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.label_outer()
    figure.savefig(PICTURES / f"screening-{name}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=["vits", "vit7", "cnn"], default="vits")
    parser.add_argument("--quick", action="store_true", help="two seeds, nothing written")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = command.can_redraw(parser).parse_args()
    if given.redraw:
        kept = report.kept("screening", given.encoder)["rows"]
        draw(given.encoder, {Case(row["kind"], row["task"], row["seed"]): row for row in kept})
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    setting, seeds = Setting(given.encoder), SEEDS[:2] if given.quick else SEEDS
    asked, found = cases(seeds), {}
    clean = [zoo.Recipe(case.task, case.seed, handed.ROWS) for case in asked if case.kind == "clean"]
    zoo.prepare(setting, [*clean, *(zoo.Recipe(task, defenders.SEED, defenders.ROWS) for task in ATTACKED)])
    plans = [plan for by_place in BANKED.plans().values() for plan in by_place]
    with zoo.workforce(given.workers) as pool:
        zoo.at_once(pool, f"bank of {given.encoder}", partial(attackers.upload, setting), plans)
        with progress("contributors", len(asked)) as step:
            for case, row in zip(asked, pool.map(partial(measured, setting), asked), strict=True):
                found[case] = row
                step()
    text = tables(given.encoder, found)
    print(text)
    if not given.quick:
        rows = [case._asdict() | row for case, row in found.items()]
        report.keep("screening", given.encoder, {"rows": rows})
        draw(given.encoder, found)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
