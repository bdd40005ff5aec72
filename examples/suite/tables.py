"""The tables that the backdoor study prints, made of its results as they are in the JSON file."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations

from .cache import Json
from .report import percent, text_table

Row = Mapping[str, Json]

NOTES = """
control  the same merge, defended in the same way, with the clean twin in the attacker's place; gain = ASR - control
oracle   is told the attack's own vector: a bound, not a defence
twins    of the probe (random, shuffled) are at its strength and are means over draws, with the range beside them
shrink'  the ASR that shrinking alone leaves at the same accuracy (validation images, the strength chosen for the row)
Strengths are the largest of six that keep 98 % of the validation accuracy; WAG takes all it is given.
One seed and one model a cell: differences of a few points are noise.
"""


def everything(results: Row, rows: int) -> str:
    """All tables, one after another."""
    tables = [
        calibration(results["calibration"], rows),
        alone(results["alone"]),
        likeness(results["likeness"]),
        injection(results["injection"]),
        undefended(results["undefended"], "paper"),
        undefended(results["undefended"], "validated"),
        *(defended(rows) for rows in _by(results["defended"], "attack").values()),
    ]
    return "\n".join([*tables, NOTES])


def calibration(lines: Mapping[str, Mapping[str, float]], rows: int) -> str:
    tasks = list(lines["base"])
    body = [
        [name, *(percent(line[task]) for task in tasks), percent(sum(line.values()) / len(line))]
        for name, line in lines.items()
    ]
    return text_table(
        f"Accuracy, % (test; {rows} images of the attacked task, half as many of others)", ["", *tasks, "mean"], body
    )


def alone(rows: Sequence[Row]) -> str:
    title = "Backdoored models before any merge, and the same trigger on their clean twins and on the base, %"
    header = ["model", "ASR", "clean twin", "base", "n", "accuracy", "clean twin"]
    body = []
    for row in rows:
        rates = [percent(row[who]["asr"]) for who in ("backdoored", "clean twin", "on base")]
        right = [percent(row[who]["accuracy"]) for who in ("backdoored", "clean twin")]
        body.append([row["attack"], *rates, row["n"], *right])
    return text_table(title, header, body)


def likeness(found: Row) -> str:
    """Mean cosine of the pairs in each relation; the matrices themselves are in the JSON file."""
    pairs: dict[str, list[tuple[int, int]]] = {}
    for (i, one), (j, two) in combinations(enumerate(found["kinds"]), 2):
        relation = " and ".join(what for what, a, b in zip(("trigger", "class"), one, two, strict=True) if a == b)
        pairs.setdefault(f"same {relation}" if relation else "neither the same", []).append((i, j))
    body = [
        [relation, len(places), *(_mean_of(found[twins], places) for twins in ("own twins", "one shared twin"))]
        for relation, places in pairs.items()
    ]
    norms = ", ".join(f"{name}: {norm:.2f}" for name, norm in zip(found["names"], found["norms"], strict=True))
    table = text_table("Cosines of backdoor vectors", ["", "pairs", "own twins", "one shared twin"], body)
    return f"{table}\nNorms - {norms}"


def _mean_of(matrix: Sequence[Sequence[float]], places: Sequence[tuple[int, int]]) -> str:
    return f"{sum(matrix[i][j] for i, j in places) / len(places):.2f}"


def injection(curves: Mapping[str, Mapping[str, Row]]) -> str:
    lambdas = list(next(iter(curves.values())))
    what = {"ASR": "asr", "acc.": "accuracy"}
    header = ["lambda", *(f"{label}, {name[-6:]}" for label in what for name in curves)]
    body = [[by, *(percent(curve[by][key]) for key in what.values() for curve in curves.values())] for by in lambdas]
    return text_table("Injection: clean model + lambda x its backdoor vector, alone, %", header, body)


def undefended(rows: Sequence[Row], kind: str) -> str:
    """Attacks down, merges across; first the triggers without any backdoor."""
    chosen = [row for row in rows if row["scale is"] == kind]
    merges = _by(chosen, "merge")
    header = ["attack", "norm", "n", *(text for name in merges for text in (f"{name}:", "gain", "acc."))]
    body, controls = [], []
    for name, cells in _by(chosen, "attack").items():
        n = cells[0]["asr"]["n"]
        planted = ((cell["asr"]["value"], cell["gain"], cell["ba"]) for cell in cells)
        body.append([name, f"{cells[0]['norm']:.2f}", n, *_threes(planted)])
        if name.startswith("single"):
            clean = ((cell["controls"]["clean merge"]["value"], None, cell["ca"]) for cell in cells)
            controls.append([f"none: clean twin of {name[7:]}", "", n, *_threes(clean)])
    scales = "; ".join(f"{name} {_range([cell['scale'] for cell in cells])}" for name, cells in merges.items())
    title = f"After the merge, no defence: ASR, gain over the control and accuracy, %, at the {kind} scale ({scales})"
    return text_table(title, header, [*controls, *body])


def _threes(cells: Iterable[tuple[float, float | None, float]]) -> list[str]:
    """ASR, gain (none for a control) and accuracy of each merge, side by side."""
    texts = (
        (percent(rate), "" if gain is None else f"{100 * gain:+.1f}", percent(right)) for rate, gain, right in cells
    )
    return list(chain.from_iterable(texts))


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def defended(rows: Sequence[Row]) -> str:
    """One attack: defences under each merge."""
    header = ["merge", "defence", "is given", "strength", "acc.", "ASR", "control", "gain", "n", "range", "shrink'"]
    body = []
    for row in rows:
        draws = [one["asr"]["value"] for one in row["draws"]]
        spread = f"{percent(min(draws))}..{percent(max(draws))}" if len(draws) > 1 else ""
        bound = "" if row["shrinking as accurate"] is None else percent(row["shrinking as accurate"])
        figures = [percent(row[what]) for what in ("ba", "asr", "control")]
        words = [row["merge"], row["defence"], row["given"], f"{row['strength']:g}" if row["strength"] else "-"]
        body.append([*words, *figures, f"{100 * row['gain']:+.1f}", row["n"], spread, bound])
    return text_table(f"Defences against {rows[0]['attack']}, %", header, body)


def _by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups
