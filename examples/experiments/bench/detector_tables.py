"""Tables of the detector: each attack's contributors against the clean ones, and false alarms by merge."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from taskvec.metrics import Rate, roc

from .report import text_table

STATISTICS = ("bank", "bank without the head", "bank of another base", "norm", "leading")
Rows = Mapping[Any, Mapping[str, Any]]
"""case, with its `world`, `merge`, `attack` ("" where all are clean) and `target` -> what was seen of its merge."""


def clean_values(rows: Rows, name: str) -> list[float]:
    """Of every contributor of the clean merges."""
    return [value for case, row in rows.items() if not case.attack for value in row[name].values()]


def attack_line(rows: Rows, attack: str, task: str) -> list[object]:
    """How well an attack's contributors are told from the clean ones."""
    own = [row for case, row in rows.items() if case.attack == attack]
    found = [roc([row[name][task] for row in own], clean_values(rows, name)) for name in STATISTICS]
    asr = [f"{100 * fmean(hit / n for hit, n in (row['asr'][rule] for row in own)):.0f}" for rule in own[0]["asr"]]
    flags = f"{sum(task in row['flagged'] for row in own)} of {len(own)}"
    return [attack, *asr, *(f"{one.area:.2f} / {one.found:.2f}" for one in found), flags]


def alarms(rows: Rows, task: str) -> list[list[object]]:
    """Merges in which a clean contributor is flagged."""
    groups = {
        "all clean": [set(row["flagged"]) for case, row in rows.items() if not case.attack],
        "with an attacker": [set(row["flagged"]) - {task} for case, row in rows.items() if case.attack],
    }
    body: list[list[object]] = []
    for name, flagged in groups.items():
        if flagged:
            rate = Rate(sum(map(bool, flagged)), len(flagged))
            low, high = rate.interval
            body.append([name, rate.hits, rate.n, f"{100 * low:.1f} to {100 * high:.1f}", sum(map(len, flagged))])
    return body


def tables(rows: Rows, task: str) -> str:
    """Everything that is there."""
    attacks = list(dict.fromkeys(case.attack for case in rows if case.attack))
    if not clean_values(rows, "bank") or not attacks:
        return "there are no rows yet"
    rules = next(row["asr"] for case, row in rows.items() if case.attack)
    worlds = len({case.world for case in rows})
    clean = len(clean_values(rows, "bank"))
    return "\n".join(
        [
            text_table(
                f"{task}, {worlds} worlds: {clean} clean contributors against those of each attack;\n"
                "ASR in the undefended merge, per cent; area under the ROC / true positives at 5 % false positives; "
                "flagged at 6 deviations",
                ["attack", *(f"ASR, {rule}" for rule in rules), *STATISTICS, "flagged"],
                [attack_line(rows, attack, task) for attack in attacks],
            ),
            text_table(
                "False alarms, by merges: 95 % Wilson intervals, as if merges of one world were independent",
                ["merges", "with an alarm", "of", "per cent", "contributors flagged"],
                alarms(rows, task),
            ),
        ]
    )
