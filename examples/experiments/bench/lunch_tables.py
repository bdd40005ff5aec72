"""Tables and the picture of the text experiment, from measured rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from taskvec.metrics import Estimate, estimate

from . import pictures
from .report import text_table
from .texts import ATTACKS

Rows = Sequence[Mapping[str, Any]]


class Shown(NamedTuple):
    """A line of a table: its measured rows by seed, and those it is compared with.

    Attributes:
        attack: of the victim.
        title: what is merged.
        rule: how.
        own: the merge.
        controls: the merge with the clean twin in the victim's place.
        floor: the clean twin alone.
        victim: alone.
        base: the pre-trained model.
    """

    attack: str
    title: str
    rule: str
    own: Rows
    controls: Rows
    floor: Rows
    victim: Rows
    base: Rows


def rate(rows: Rows, hits: str = "fooled", n: str = "triggered") -> list[float]:
    """Hits in per cent, seed by seed; by default the ASR."""
    return [100 * row[hits] / row[n] for row in rows]


def gone(asr: float, low: float, high: float) -> float:
    """The share of what a backdoor adds to the floor that a merge removes, in per cent."""
    return 100 * (high - asr) / (high - low) if high > low else float("nan")


def share_gone(one: Shown) -> str:
    """The mean of it over seeds; a dash where the victims have no backdoor to speak of."""
    asr, low, high = rate(one.own), rate(one.floor), rate(one.victim)
    if fmean(high) - fmean(low) < 5:
        return "-"
    return f"{fmean(gone(*values) for values in zip(asr, low, high, strict=True)):.0f}"


def lines_table(title: str, lines: Sequence[Shown]) -> str:
    """A row for each line: means over seeds with t intervals, per cent."""
    header = ["attack", "merge of", "rule", "CACC", "ASR", "all clean", "floor", "gone", "base", "flips", "n"]
    table: list[list[object]] = [
        [
            one.attack,
            one.title,
            one.rule,
            estimate(rate(one.own, "correct", "n")),
            estimate(rate(one.own)),
            f"{fmean(rate(one.controls)):.1f}",
            f"{fmean(rate(one.floor)):.1f}",
            share_gone(one),
            f"{fmean(rate(one.base)):.0f}",
            f"{fmean(rate(one.own, 'flipped', 'others')):.1f}",
            f"{one.own[0]['triggered']} x {len(one.own)}",
        ]
        for one in lines
    ]
    return text_table(title, header, table)


Named = tuple[str, str, str]
"""A line by its title, rule and attack."""

ORDERINGS: tuple[tuple[str, Named, Named], ...] = (
    ("a second partner", ("+ 2 clean", "WAG", "cf@20"), ("+ 1 clean", "WAG", "cf@20")),
    ("a third", ("+ 3 clean", "WAG", "cf@20"), ("+ 2 clean", "WAG", "cf@20")),
    ("a fourth", ("+ 4 clean", "WAG", "cf@20"), ("+ 3 clean", "WAG", "cf@20")),
    ("TIES against the average", ("+ 2 clean", "TIES", "cf@20"), ("+ 2 clean", "WAG", "cf@20")),
    ("10 % poisoned against 20 %, one partner", ("+ 1 clean", "WAG", "cf@10"), ("+ 1 clean", "WAG", "cf@20")),
    ("the same, two partners", ("+ 2 clean", "WAG", "cf@10"), ("+ 2 clean", "WAG", "cf@20")),
    *(
        (f"{attack}: TIES against the average", ("+ 2 clean", "TIES", attack), ("+ 2 clean", "WAG", attack))
        for attack in ATTACKS
    ),
)
"""What is compared seed by seed: its name, a line, and the line that it is compared with."""


def orderings_table(lines: Sequence[Shown]) -> str:
    """Differences of ASR seed by seed, of the orderings whose lines are there; nothing if none is."""
    known = {(one.title, one.rule, one.attack): rate(one.own) for one in lines}
    rows: list[list[object]] = []
    for name, one, other in ORDERINGS:
        if one in known and other in known:
            values = [a - b for a, b in zip(known[one], known[other], strict=True)]
            rows.append([name, estimate(values), f"{sum(x > 0 for x in values)} of {len(values)}"])
    return text_table("ASR seed by seed, points", ["what", "difference", "higher in"], rows) if rows else ""


def rules_table(lines: Sequence[Shown], title: str = "+ 2 clean") -> str:
    """Rules by attacks: ASR, the share of the backdoor that is gone (in brackets), mean accuracy over attacks.

    Rules of the victim alone come last; with fewer than two attacks there is no table.
    """
    attacks = list(dict.fromkeys(one.attack for one in lines))
    wanted = [one for one in lines if one.title == title or (one.title == "alone" and one.rule != "WAG")]
    rules = dict.fromkeys((one.title, one.rule) for one in wanted)
    found = {(one.title, one.rule, one.attack): one for one in wanted}
    if len(attacks) < 2 or not rules:
        return ""
    body: list[list[object]] = []
    for merge, rule in rules:
        own = [found.get((merge, rule, attack)) for attack in attacks]
        accuracies = [fmean(rate(one.own, "correct", "n")) for one in own if one]
        body.append([merge, rule, *(_left(one) if one else "-" for one in own), f"{fmean(accuracies):.1f}"])
    header = ["merge of", "rule", *attacks, "CACC"]
    return text_table("ASR (and the share gone of what is above the floor), means over seeds, per cent", header, body)


def _left(one: Shown) -> str:
    return f"{fmean(rate(one.own)):.0f} ({share_gone(one)})"


def together_table(lines: Sequence[Shown]) -> str:
    """What averaging leaves of all victims that are averaged with each other; nothing if there are none."""
    if not lines:
        return ""
    rows: list[list[object]] = [
        [name, _mean_over_lines([rate(rows) for rows in groups])]
        for name, groups in {
            "alone": [one.victim for one in lines],
            "averaged": [one.own for one in lines],
            "clean models": [one.floor for one in lines],
        }.items()
    ]
    return text_table(f"Mean ASR of {len(lines)} victims with different words", ["models", "ASR"], rows)


def _mean_over_lines(values: Sequence[Sequence[float]]) -> Estimate:
    return estimate(fmean(of_seed) for of_seed in zip(*values, strict=True))


def draw(path: Path, lines: Sequence[Shown]) -> None:
    """Averages with more and more clean models, for each attack, and the floor."""
    titles = ("alone", "+ 1 clean", "+ 2 clean", "+ 3 clean")
    found = {(one.attack, one.title): one for one in lines if one.rule == "WAG"}
    attacks = [attack for attack in dict.fromkeys(one.attack for one in lines) if (attack, titles[-1]) in found]
    series = {a: [estimate(rate(found[a, title].own)) for title in titles] for a in attacks}
    floors = {a: fmean(rate(found[a, "alone"].floor)) for a in attacks}
    pictures.by_models(path, "More models: what is left of the ASR is mostly the floor's", series, floors)
