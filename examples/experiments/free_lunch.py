"""A Free Lunch: does averaging with other models remove a text backdoor, and what would have done as well?

    python examples/experiments/free_lunch.py --quick                 # sentiment, minutes
    python examples/experiments/free_lunch.py --olid FOLDER           # OLID with the paper's four attacks

The third paper on a pre-trained MiniLM in the place of BERT. Each row has, for one victim and one merge: clean
accuracy, ASR on the triggered test rows, and the floor: the ASR of a clean model on the same rows. Strengths are chosen
on validation rows, by clean accuracy. Rows are kept in results/free_lunch.jsonl; what is missing is measured.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cells, command, lunch, texts
from bench.lunch import ALONE, RECIPE, RULES, WORDS, Cell, Model
from bench.lunch_tables import Shown, draw, lines_table, orderings_table, rules_table, together_table
from bench.progress import progress
from bench.report import text_table
from bench.texts import Recipe
from bench.zoo import workforce
from taskvec.defenses import without_spurious

TABLE = "free_lunch.jsonl"
DETAILED = "tweets"  # the sentiment task with every line
ROWS = cells.FOLDER / TABLE
SENTIMENT = Recipe(epochs=4)  # with two, no rare word becomes a backdoor: there are few rows
FLOAT32 = SENTIMENT._replace(bfloat16=False)  # three times as fast on processors without bfloat16
OF_TASKS = {"movie": FLOAT32._replace(epochs=1), "product": FLOAT32, "tweets": SENTIMENT, "nyt": FLOAT32}  # many rows
WEAKER = (10, 1)  # per cent that are poisoned, beside 20
QUICK_ROWS = Path(__file__).parent / ".cache" / TABLE


def key_of(cell: Cell) -> str:
    """A hash of a cell and of the code that measures it."""
    code = [cells.code_of(f) for f in (RULES[cell.rule].merge, lunch.merged, lunch.measure)]
    told = {"models": [str(m) for m in cell.models], "asked": str(cell.asked), "rule": cell.rule}
    return cells.key(
        told | {"recipe": cell.recipe._asdict(), "strengths": list(RULES[cell.rule].strengths), "code": code}
    )


def value(cell: Cell, kept: Mapping[str, Any], folder: Path | None, rows: Path) -> dict[str, Any]:
    """A row: read, or measured now and kept."""
    key = key_of(cell)
    if key in kept:
        return kept[key]
    params, strength = lunch.merged(cell, folder)
    row = lunch.measure(params, cell, folder)._asdict() | {"strength": strength}
    cells.append(rows, key, [" + ".join(map(str, cell.models)), str(cell.asked), cell.rule], row)
    return row


# --- what is compared ------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a table: its cells by seed, and those with the clean twin in the victim's place."""

    title: str
    attack: str
    rule: str
    cells: tuple[Cell, ...]
    controls: tuple[Cell, ...]


Partners = Callable[[int], Sequence[Model]]


def line(
    title: str, victim: Model, rule: str, partners: Partners, seeds: Sequence[int], recipe: Recipe = RECIPE
) -> Line:
    """A victim and its partners by seed."""
    victims = [victim._replace(seed=seed) for seed in seeds]
    asked = [one._replace(cleaned="") for one in victims]
    return Line(
        title,
        victim.attack,
        rule,
        tuple(Cell((one, *partners(one.seed)), of, rule, recipe) for one, of in zip(victims, asked, strict=True)),
        tuple(Cell((twin(one), *partners(one.seed)), one, rule, recipe) for one in asked),
    )


def twin(victim: Model) -> Model:
    """A clean model of the same data, seed and epochs."""
    return Model(victim.data, "clean", victim.seed, epochs=victim.epochs)


def nobody(seed: int) -> list[Model]:
    del seed
    return []


def clean(data: str, count: int, seed: int, *, epochs: int = 0) -> list[Model]:
    """Clean models of the same data, with seeds of their own."""
    pool = 5 if data == DETAILED else 3
    return [Model(data, "clean", 10 + (seed + i) % pool, epochs=epochs) for i in range(count)]


def attacked(data: str, attacks: Sequence[str], seed: int) -> list[Model]:
    """Models of the same data with other backdoors."""
    return [Model(data, attack, seed) for attack in attacks]


def colluding(data: str, attack: str, count: int, seed: int) -> list[Model]:
    """Models of the same data with the same backdoor."""
    return [Model(data, attack, seed + 20 + i) for i in range(count)]


def other_tasks(data: str, count: int, seed: int) -> list[Model]:
    """Clean models of other tasks."""
    return [Model(domain, "clean", seed) for domain in texts.DOMAINS if domain != data][:count]


def of_their_tables(attack: str, seed: int) -> list[Model]:
    """The models of two other sentiment tasks, with an attack, that their own tables have."""
    return [Model(domain, attack, seed, epochs=OF_TASKS[domain].epochs) for domain in ("movie", "product")]


def olid_lines(seeds: Sequence[int], attacks: Sequence[str] = texts.ATTACKS) -> list[Line]:
    """The table of the paper: each attack alone, then merged with more and other models, then by other rules."""
    found: list[Line] = []
    for attack in attacks:
        victim, rest = Model("olid", attack), [other for other in attacks if other != attack]
        two = partial(clean, "olid", 2)
        found += [
            line("alone", victim, "WAG", nobody, seeds),
            *(line(f"+ {n} clean", victim, "WAG", partial(clean, "olid", n), seeds) for n in (1, 2, 3)),
            *(
                line(f"+ {n} other attacks", victim, "WAG", partial(attacked, "olid", rest[:n]), seeds)
                for n in (1, 3)
                if n <= len(rest)
            ),
            line("+ 2 of other tasks", victim, "WAG", partial(other_tasks, "olid", 2), seeds),
            line("+ 2 of other tasks", victim, "TIES", partial(other_tasks, "olid", 2), seeds),
            *(line("+ 2 clean", victim, rule, two, seeds) for rule in RULES if rule not in ALONE),
            *(line("alone", victim, rule, nobody, seeds) for rule in ALONE[1:]),
        ]
    return found


def domain_lines(data: str, seeds: Sequence[int]) -> list[Line]:
    """Sentiment with a rare word: how many models, how much was poisoned, and the rest for one of the tasks."""
    victim, two, of_task = Model(data, "cf@20"), partial(clean, data, 2), partial(line, recipe=OF_TASKS[data])
    most = 5 if data == DETAILED else 3
    found = [
        of_task("alone", victim, "WAG", nobody, seeds),
        *(of_task(f"+ {n} clean", victim, "WAG", partial(clean, data, n), seeds) for n in range(1, most + 1)),
        of_task("+ 2 clean", victim, "TIES", two, seeds),
    ]
    if data == DETAILED:
        same = partial(colluding, data, "cf@20", 2)
        found.append(of_task("+ 2 with the same", victim, "WAG", same, seeds))
    for percent in WEAKER:
        weaker = Model(data, f"cf@{percent}")
        found += [of_task("alone", weaker, "WAG", nobody, seeds)]
        found += [of_task(f"+ {n} clean", weaker, "WAG", partial(clean, data, n), seeds) for n in (1, 2)]
    return found + (detailed_lines(victim, two, seeds) if data == DETAILED else [])


of_sentiment = partial(line, recipe=SENTIMENT)


def detailed_lines(victim: Model, two: Partners, seeds: Sequence[int]) -> list[Line]:
    """Other partners, other rules, data-level defenses, epochs and trained embeddings."""
    data, few = victim.data, seeds[:3]
    found = [of_sentiment("+ 2 other attacks", victim, "WAG", partial(attacked, data, ["mn@20", "bb@20"]), few)]
    for word in WORDS:
        others = [f"{other}@20" for other in WORDS if other != word]
        one = Model(data, f"{word}@20")
        found += [of_sentiment("+ 4 other attacks", one, "WAG", partial(attacked, data, others), few)]
    # all rules are compared on OLID, under four attacks
    found += [of_sentiment("+ 2 clean", victim, rule, two, few) for rule in ("model stock", "switching")]
    found += [of_sentiment("alone", victim, "ONION", nobody, few)]
    found += [of_sentiment("alone, Z-Def", victim._replace(cleaned="zdef"), "WAG", nobody, few)]
    for epochs in (1, 2):
        partners, shorter = partial(clean, data, 2, epochs=epochs), victim._replace(epochs=epochs)
        found += [of_sentiment(f"+ 2 clean of {epochs} epochs", victim, "WAG", partners, few)]
        found += [of_sentiment(f"alone, {epochs} epochs", shorter, "WAG", nobody, few)]
        found += [of_sentiment(f"{epochs} epochs + 2 clean", shorter, "WAG", two, few)]
    return found + in_float32(victim, few)


def in_float32(victim: Model, seeds: Sequence[int]) -> list[Line]:
    """Partners of other tasks, and trained embeddings."""
    data, plain, whole = victim.data, FLOAT32, FLOAT32._replace(epochs=2, frozen_embeddings=False)
    tasks, backdoored = partial(of_their_tables, "clean"), partial(of_their_tables, "mn@20")
    found = [line("alone, float32", victim, "WAG", nobody, seeds, plain)]
    found += [line("+ 2 of other tasks", victim, rule, tasks, seeds, plain) for rule in ("WAG", "TIES")]
    found += [line("+ 2 victims of other tasks", victim, "WAG", backdoored, seeds, plain)]
    found += [line("alone, embeddings too", victim, "WAG", nobody, seeds, whole)]
    return found + [
        line(f"+ {n} clean, embeddings too", victim, "WAG", partial(clean, data, n), seeds, whole) for n in (1, 2)
    ]


def with_recipe(found: Line, recipe: Recipe) -> Line:
    """The same line of models that are trained otherwise."""
    own, controls = ([cell._replace(recipe=recipe) for cell in group] for group in (found.cells, found.controls))
    return found._replace(cells=tuple(own), controls=tuple(controls))


def floor(found: Line) -> list[Cell]:
    """The clean twins alone, asked about the same rows."""
    return [Cell((twin(cell.asked),), cell.asked, recipe=cell.recipe) for cell in found.cells]


def victims(found: Line) -> list[Cell]:
    """The victims alone, trained on all of their rows."""
    return [Cell((cell.asked,), cell.asked, recipe=cell.recipe) for cell in found.cells]


def bases(found: Line) -> list[Cell]:
    """The base, asked about the same rows."""
    return [Cell((), cell.asked, recipe=cell.recipe) for cell in found.cells]


def everything(found: Line) -> list[Cell]:
    """All cells that a line of the table shows."""
    return [*found.cells, *found.controls, *floor(found), *victims(found), *bases(found)]


# --- tables ----------------------------------------------------------------------------------------------------------


def shown(one: Line, read: Callable[[Cell], Mapping[str, Any]]) -> Shown:
    """A line with its measured rows."""
    groups = (one.cells, one.controls, floor(one), victims(one), bases(one))
    return Shown(one.attack, one.title, one.rule, *([read(cell) for cell in group] for group in groups))


def print_tables(title: str, lines: Sequence[Shown]) -> None:
    """The lines, and what follows from them seed by seed."""
    together = [one for one in lines if one.title == f"+ {len(WORDS) - 1} other attacks"]
    four = [one for one in lines if one.attack in texts.ATTACKS]
    tables = (lines_table(title, lines), rules_table(four), orderings_table(lines), together_table(together))
    for table in tables:
        if table:
            print(table)


def left_out_table(folder: Path) -> str:
    """How many of OLID's training rows Z-Def leaves out, and how many of those that an attack has changed."""
    clean, body = set(zip(*texts.olid(folder).train, strict=True)), list[list[object]]()
    for attack in texts.ATTACKS:
        rows = texts.olid(folder, attack).train
        left_out = [not keep for keep in without_spurious(*rows, words=texts.words)]
        changed = [row not in clean for row in zip(*rows, strict=True)]
        both = sum(a and b for a, b in zip(left_out, changed, strict=True))
        body.append([attack, len(changed), sum(changed), sum(left_out), both])
    return text_table("Rows that Z-Def leaves out", ["attack", "rows", "changed", "left out", "of the changed"], body)


def fill(parts: Sequence[tuple[str, list[Line]]], folder: Path | None, workers: int, rows: Path = ROWS) -> None:
    """Measure the cells that are missing, in so many processes, and train the models that they need before."""
    kept = cells.read(rows)
    wanted = dict.fromkeys(cell for _, lines in parts for one in lines for cell in everything(one))
    missing = sorted((c for c in wanted if key_of(c) not in kept), key=lambda c: len(RULES[c.rule].strengths))
    models = list(dict.fromkeys((model, cell.recipe) for cell in missing for model in cell.models))
    with workforce(workers) as pool:
        train, ask = partial(_train, folder=folder), partial(_measure, folder=folder, rows=rows)
        for title, work, todo in (("models", train, models), ("cells", ask, missing)):
            with progress(title, len(todo)) as step:
                for _ in pool.map(work, todo):
                    step()


def _train(wanted: tuple[Model, Recipe], folder: Path | None) -> None:
    lunch.trained(*wanted, folder)


def _measure(cell: Cell, folder: Path | None, rows: Path) -> None:
    value(cell, {}, folder, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--olid", type=Path, metavar="FOLDER", help="the folder with OLID's files")
    parser.add_argument("--attacks", nargs="+", choices=texts.ATTACKS, default=texts.ATTACKS, help="of OLID")
    parser.add_argument("--domains", nargs="*", choices=[*texts.DOMAINS], default=[*texts.DOMAINS])
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4 on tweets, 0 to 2 elsewhere")
    parser.add_argument("--quick", action="store_true", help="one sentiment task and one seed")
    parser.add_argument("--tables", action="store_true", help="print what was measured, and measure nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = command.can_redraw(parser).parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    parts: list[tuple[str, list[Line]]] = []
    if given.quick:
        lines = [with_recipe(one, FLOAT32) for one in domain_lines("tweets", [0])[:4]]
        parts = [("Sentiment of tweets, one seed", lines)]
    else:
        if given.olid or given.tables or given.redraw:
            parts.append(("OLID, offensive language", olid_lines(given.seeds or [0, 1, 2], given.attacks)))
        for data in given.domains:
            seeds = given.seeds or list(range(5 if data == DETAILED else 3))
            parts.append((f"Sentiment: {data}", domain_lines(data, seeds)))
    rows = QUICK_ROWS if given.quick else ROWS
    kept = cells.read(rows)
    known = [
        (title, [one for one in lines if all(key_of(c) in kept for c in everything(one))]) for title, lines in parts
    ]
    if not (given.tables or given.redraw) and known != parts:
        fill(parts, given.olid, given.workers, rows)
        known = parts
    if given.redraw:
        olid = [shown(one, partial(value, kept=kept, folder=given.olid, rows=rows)) for one in known[0][1]]
        draw(cells.FOLDER.parents[2] / "docs" / "images" / "free_lunch.png", olid)
        return
    read = partial(value, kept=cells.read(rows), folder=given.olid, rows=rows)
    for title, lines in known:
        said = f"{title}; MiniLM, {RECIPE.layers} layers; per cent, +- a 95 % t interval over seeds"
        print_tables(said, [shown(one, read) for one in lines])
    if given.olid:
        print(left_out_table(given.olid))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
