"""The bank of probes on text: does it tell a backdoored sentiment model from clean ones before they are averaged?

    python examples/experiments/free_lunch_bank.py             # MiniLM on tweets
    python examples/experiments/free_lunch_bank.py --tables    # what was measured

Five models of one task, the first of them backdoored by a rare word, or its clean twin. The defender has validation
rows alone and makes probes of them, with another word, for both classes.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from bench import cells, lunch, lunch_bank
from bench.lunch import Model
from bench.lunch_bank import Case, Probe
from bench.progress import progress
from bench.report import text_table
from bench.texts import Recipe
from bench.zoo import workforce
from free_lunch import DETAILED, FLOAT32, clean, twin
from taskvec.metrics import estimate, roc

ROWS = cells.FOLDER / "lunch_bank.jsonl"
ATTACKS = ("cf@20", "mn@20")
THRESHOLD = 6.0  # deviations: the library's default


def cases(seeds: Sequence[int]) -> list[Case]:
    """Every attack and seed, with the victim and with its clean twin."""
    victims = [Model(DETAILED, attack, seed) for attack in ATTACKS for seed in seeds]
    return [Case((first, *clean(DETAILED, 4, one.seed)), one, FLOAT32) for one in victims for first in (one, twin(one))]


def key_of(case: Case) -> str:
    """A hash of a case and of the code that measures it."""
    told = {"models": [str(m) for m in case.models], "asked": str(case.asked), "recipe": case.recipe._asdict()}
    settings = {name: getattr(lunch_bank, name) for name in ("PROBE", "SHARE", "EPOCHS")}
    return cells.key(told | settings | {"code": cells.code_of(lunch_bank.measured)})


def _train(wanted: tuple[Recipe, Model | Probe]) -> None:
    recipe, one = wanted
    if isinstance(one, Model):
        lunch.trained(one, recipe, None)
    else:
        lunch_bank.probe_model(one, recipe)


def fill(case: Case) -> None:
    cells.append(ROWS, key_of(case), [str(case.models[0]), str(case.asked)], lunch_bank.measured(case))


# --- tables ----------------------------------------------------------------------------------------------------------


def merges_line(
    title: str, attack: str, rows: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]
) -> list[object]:
    """What a defense leaves, over seeds: of the merge with the victim, and of the one with the clean twin."""
    own, clean_ones = ([row["merges"][title] for row in group] for group in (rows, controls))
    return [
        attack,
        title,
        estimate(100 * row["correct"] / row["n"] for row in own),
        estimate(100 * row["fooled"] / row["triggered"] for row in own),
        f"{fmean(100 * row['fooled'] / row['triggered'] for row in clean_ones):.1f}",
        f"{fmean(100 * row['correct'] / row['n'] for row in clean_ones):.1f}",
        f"{own[0]['triggered']} x {len(own)}",
    ]


def tables(found: Mapping[Case, Mapping[str, Any]]) -> str:
    """Who is found, and what leaving out or disarming the highest score saves."""
    seen: list[list[object]] = []
    left: list[list[object]] = []
    for attack in dict.fromkeys(case.asked.attack for case in found):
        own = [row for c, row in found.items() if c.asked.attack == attack and c.models[0] == c.asked]
        controls = [row for c, row in found.items() if c.asked.attack == attack and c.models[0] != c.asked]
        everyone = [*(scores for row in controls for scores in row["scores"])]
        victims = [row["scores"][0] for row in own]
        line: list[object] = [attack, f"{fmean(100 * row['probe'][0] / row['probe'][1] for row in own):.0f}"]
        line += [f"{roc([max(s) for s in victims], [max(s) for s in everyone]).area:.2f}"]
        line += [f"{roc([s[1] for s in victims], [s[1] for s in everyone]).area:.2f}"]
        spectra = [row["spectrum"][0] for row in own], [x for row in controls for x in row["spectrum"]]
        line += [f"{roc(*spectra).area:.2f}"]
        line += [f"{sum(row['highest'][0] == 0 for row in own)} of {len(own)}"]
        line += [f"{sum(row['highest'][2] > THRESHOLD for row in group)} of {len(group)}" for group in (own, controls)]
        seen.append(line)
        left += [merges_line(title, attack, own, controls) for title in own[0]["merges"]]
    header = ["attack", "ASR of the probe", "bank", "its class alone", "spectrum", "highest is the victim"]
    return "\n".join(
        [
            text_table(
                "The victim among five models of tweets: area under the ROC against clean ones; merges with a score "
                f"above {THRESHOLD:g} deviations",
                [*header, "flagged", "flagged, all clean"],
                seen,
            ),
            text_table(
                "Averages of five; per cent, +- a 95 % t interval over seeds",
                ["attack", "merge", "CACC", "ASR", "all clean: ASR", "CACC", "n"],
                left,
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="print what was measured, and measure nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    wanted = cases(given.seeds)
    kept = cells.read(ROWS)
    todo = [case for case in wanted if key_of(case) not in kept]
    if todo and not given.tables:
        wanted_models = ((c.recipe, one) for c in todo for one in (*c.models, *lunch_bank.probes_of(c)))
        with workforce(given.workers) as pool:
            for title, work, each in (("models", _train, [*dict.fromkeys(wanted_models)]), ("merges", fill, todo)):
                with progress(title, len(each)) as step:
                    for _ in pool.map(work, each):
                        step()
        kept = cells.read(ROWS)
    print(tables({case: kept[key] for case in wanted if (key := key_of(case)) in kept}))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
