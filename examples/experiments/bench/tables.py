"""The study's tables: every defense beside its controls, and the comparisons that were written down before the run."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec import plot
from taskvec.metrics import Estimate, clustered, estimate

from . import pictures
from .defenders import DEFENCES, TWINS
from .report import text_table
from .significance import holm, t_test


class Point(NamedTuple):
    """A model on validation data: mean accuracy over the tasks, and ASR."""

    accuracy: float
    asr: float


Row = Mapping[str, Any]
Rows = Mapping[Any, Mapping[str, Mapping[str, Row]]]
"""cell (with its `attack`, `seed` and `target`) -> merge -> defense -> row."""
ByCell = Mapping[tuple[int, int], Row]
"""(seed, target) -> row."""

PAIRS = (
    ("ours", "IBVS"),
    ("ours", "shrinking"),
    ("ours", "WAG + 2"),
    ("ours", "clipping"),
    ("ours, disarming", "shrinking"),
    ("ours, disarming", "ours"),
    ("ours, disarming", "clipping"),
    ("ours, clipping", "shrinking"),
    ("ours, clipping", "clipping"),
    ("IBVS", "random vector"),
    ("IBVS", "shuffled probe"),
    ("IBVS", "shrinking"),
)
BASE = "ship the base"
PANELS = 2  # of a picture; what merges come later are in the tables alone
FIRST = ("task arithmetic", "TIES")  # which merges come first in a picture
LINES = 6  # of a panel
KEEP = 0.98  # the share of the undefended accuracy that a chosen strength keeps, drawn as a line
LABELS = {
    "IBVS": "IBVS",
    "shrinking": "shrinking",
    "clipping": "clipping",
    "ours": "bank, leaving out",
    "ours, disarming": "bank, disarming",
    "oracle": "oracle",
}
"""The defenses of the pictures -> their names there."""
HEADLINE = ("IBVS", "clipping", "ours, disarming")  # whose figures are in a picture's title


def everything(title: str, rows: Rows) -> str:
    """All tables as one text."""
    return "\n".join([table(f"{title}: {rule}", rows, rule) for rule in merges(rows)] + [paired(rows), level(rows)])


def glance(title: str, rows: Rows) -> str:
    """Defences by attacks, a table for every merge; means alone."""
    return "\n".join(crossed(f"{title}: {rule}", rows, rule) for rule in merges(rows))


def merges(rows: Rows) -> list[str]:
    return list(dict.fromkeys(rule for by_rule in rows.values() for rule in by_rule))


def gathered(rows: Rows, attack: str, rule: str, defence: str) -> dict[tuple[int, int], Row]:
    return {
        (cell.seed, cell.target): by_rule[rule][defence]
        for cell, by_rule in rows.items()
        if cell.attack == attack and defence in by_rule.get(rule, {})
    }


def named(rows: Rows) -> tuple[list[str], list[str]]:
    """The attacks and the defenses that there are rows of, in their order."""
    attacks = dict.fromkeys(cell.attack for cell in rows)
    defences = {name for by_rule in rows.values() for found in by_rule.values() for name in found}
    usual = [*DEFENCES, *TWINS]
    return list(attacks), [*(name for name in usual if name in defences), *sorted(defences - {*usual})]


def crossed(title: str, rows: Rows, rule: str) -> str:
    every, defences = named(rows)
    attacks = [attack for attack in every if any(gathered(rows, attack, rule, defence) for defence in defences)]
    shipped = [[base_asr(row) for row in gathered(rows, attack, rule, "none").values()] for attack in attacks]
    body: list[list[object]] = [[BASE, *(f"{fmean(found):.0f}" if found else "-" for found in shipped)]]
    for defence in defences:
        found = [list(gathered(rows, attack, rule, defence).values()) for attack in attacks]
        means = [f"{fmean(map(asr, own)):.0f} ({fmean(map(control, own)):.0f})" if own else "-" for own in found]
        body.append([defence, *means])
    text = f"{title}: ASR in per cent (that of the all-clean merge, defended alike), means over seeds and targets"
    return text_table(text, ["defence", *attacks], body)


def table(title: str, rows: Rows, rule: str) -> str:
    attacks, defences = named(rows)
    header = ["attack", "defence", "strength", "ASR", "all-clean", "gain", "n", "BA", "cost", "own task", "of"]
    body = []
    for attack in attacks:
        plain = gathered(rows, attack, rule, "none")
        by_defence = {name: gathered(rows, attack, rule, name) for name in defences}
        shipped = clustered({key: base_asr(row) for key, row in plain.items()}) if plain else "-"
        body.append([attack, BASE, "-", shipped, *["-"] * 6, sizes(plain)])
        body += [[attack, name, *line(found, plain)] for name, found in by_defence.items() if found]
    text = (
        f"{title}: ASR and accuracy in per cent, means over seeds and targets;\n"
        "+- is the half width of a 95 % t interval over seeds; cost is BA minus that of no defence;\n"
        "own task is the accuracy of the attacked task; strengths as chosen on validation images;\n"
        "of the base, which is shipped in the merge's place, no accuracy was kept"
    )
    return text_table(text, header, body)


def line(found: ByCell, plain: ByCell) -> list[Any]:
    def over(value: Callable[[Row], float]) -> Estimate:
        return clustered({key: value(row) for key, row in found.items()})

    cost = clustered({key: accuracy(row) - accuracy(plain[key]) for key, row in found.items() if key in plain})
    first = next(iter(found.values()))
    return [
        f"{over(lambda row: row['strength']).mean:.2f}",
        over(asr),
        f"{over(control).mean:.1f}",
        f"{over(lambda row: asr(row) - control(row)).mean:.1f}",
        first["draws"][0]["asr"][1],
        f"{over(accuracy).mean:.1f}",
        cost,
        f"{over(own_task).mean:.1f}",
        sizes(found),
    ]


def sizes(found: ByCell) -> str:
    """How many seeds and targets there are."""
    return f"{len({s for s, _ in found})} x {len({t for _, t in found})}"


def paired(rows: Rows) -> str:
    """ASR of one defense minus another's, on the same attack, seed and target: below 0 the first is better."""
    attacks, defences = named(rows)
    body = []
    own = [name for name in defences if name not in DEFENCES and name not in TWINS]
    for first, second in (*((name, other) for name in own for other in defences if other not in own), *PAIRS):
        for attack in attacks:
            for rule in merges(rows):
                a, b = (gathered(rows, attack, rule, name) for name in (first, second))
                if both := a.keys() & b.keys():
                    found = clustered({key: asr(a[key]) - asr(b[key]) for key in sorted(both)})
                    body.append([first, second, attack, rule, found, len({seed for seed, _ in both})])
    title = "ASR of the first defence minus that of the second, points, each at its chosen strength"
    return text_table(title, ["first", "second", "attack", "merge", "difference", "seeds"], body)


class Family(NamedTuple):
    """Comparisons that were written down together before their run."""

    title: str
    task: str
    encoders: tuple[str, ...]
    firsts: tuple[str, ...]
    rivals: tuple[str, ...]


FAMILIES = (
    Family("The primary comparison", "animal", ("vit7",), ("ours",), ("IBVS", "shrinking")),
    Family(
        "The second comparison",
        "glyph_greek",
        ("vit7", "vits"),
        ("ours, disarming", "ours, clipping"),
        ("shrinking", "ours", "clipping"),
    ),
)


def family_table(family: Family, rows: Mapping[str, Rows], attack: str = "BadMerging-on") -> str:
    """Its differences of ASR, with the p of paired t tests over seeds, corrected by Holm over the family."""
    found: dict[tuple[str, ...], list[float]] = {}
    for encoder, rule, first, second in product(family.encoders, FIRST, family.firsts, family.rivals):
        a, b = (gathered(rows[encoder], attack, rule, name) for name in (first, second))
        if both := a.keys() & b.keys():
            by_seed = {seed: [key for key in both if key[0] == seed] for seed in sorted({seed for seed, _ in both})}
            values = [fmean(asr(a[key]) - asr(b[key]) for key in own) for own in by_seed.values()]
            found[encoder, rule, first, second] = values
    ps = {name: t_test(values) for name, values in found.items()}
    corrected = holm(ps)
    body = [[*name, estimate(values), f"{ps[name]:.4f}", f"{corrected[name]:.3f}"] for name, values in found.items()]
    title = (
        f"{family.title}: {attack}, {family.task}; ASR of the first minus the second, points;\n"
        f"95 % t intervals and two-sided t tests over seeds, corrected by Holm over these {len(found)}"
    )
    return text_table(title, ["encoder", "merge", "first", "second", "difference", "p", "p (Holm)"], body)


def level(rows: Rows) -> str:
    """Every defense against shrinking at the same validation accuracy: ASR there, on validation images."""
    attacks, defences = named(rows)
    body = []
    for attack in attacks:
        for rule in merges(rows):
            shrunk = gathered(rows, attack, rule, "shrinking")
            for defence in defences:
                found = {
                    key: row
                    for key, row in gathered(rows, attack, rule, defence).items()
                    if key in shrunk and row.get("front") and defence != "shrinking"
                }
                if found:
                    values = {key: against_shrinking(row, shrunk[key]) for key, row in found.items()}
                    body.append([attack, rule, defence, clustered(values), len({seed for seed, _ in found})])
    title = "ASR minus that of shrinking at the same validation accuracy, points, at the chosen strength (validation)"
    return text_table(title, ["attack", "merge", "defence", "difference", "seeds"], body)


def against_shrinking(row: Row, shrinking: Row) -> float:
    point = row["front"][f"{row['strength']:g}"]
    points = {float(by): Point(**found) for by, found in shrinking["front"].items()}
    return 100 * (point["asr"] - shrunk_to(point["accuracy"], points))


def shrunk_to(accuracy_wanted: float, points: Mapping[float, Point]) -> float:
    """The validation ASR that shrinking leaves when it is as strong as this accuracy allows, between two strengths."""
    strengths = sorted(points, reverse=True)
    for weaker, stronger in zip(strengths[1:], strengths, strict=False):
        (low, asr_low), (high, asr_high) = points[stronger], points[weaker]
        if low >= accuracy_wanted:
            return asr_low
        if high >= accuracy_wanted:
            return asr_low + (asr_high - asr_low) * (accuracy_wanted - low) / (high - low)
    return points[0.0].asr


def draw(path: Path, rows: Rows, attack: str) -> None:
    """Accuracy against ASR as each defense grows stronger, on validation images: means over seeds and targets."""
    there = [rule for rule in merges(rows) if gathered(rows, attack, rule, "none")]
    shown = sorted(there, key=lambda rule: rule not in FIRST)[:PANELS]
    figure = Figure(figsize=(5.6 * len(shown), 5), layout="constrained")
    for axes, rule in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        paths, chosen = {}, {}
        for name in drawn(rows, attack, rule):
            found = list(gathered(rows, attack, rule, name).values())
            paths[name] = [middle([row["front"][by] for row in found]) for by in found[0]["front"]]
            chosen[name] = middle([row["front"][f"{row['strength']:g}"] for row in found])
        start = next(iter(paths.values()))[0]
        limit = KEEP * start[0]
        plot.front(paths, undefended=start, limit=limit, chosen=chosen, axes=axes)
        axes.get_legend().remove()
        _to_the_data(axes, paths, start, limit)
        _names(axes, chosen)
        _base(axes, gathered(rows, attack, rule, "none"), gathered(rows, attack, rule, "shrinking"))
        axes.annotate("no defense", start, (6, 8), textcoords="offset points", fontsize=10)
        axes.annotate("98 % of the accuracy", (limit, 0.97), (-3, 0), xycoords=("data", "axes fraction"), ha="right",
                      textcoords="offset points", fontsize=9)  # fmt: skip
        left = "; ".join(f"{label(name)} {100 * chosen[name][1]:.0f} %" for name in HEADLINE if name in chosen)
        axes.set_title(f"{attack}, {rule}\nASR left: {left}" if left else f"{attack}, {rule}", fontsize=11)
        axes.set(xlabel="accuracy, mean over the tasks (right is better)", ylabel="ASR, validation (down is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def drawn(rows: Rows, attack: str, rule: str) -> list[str]:
    """The defenses of a panel, at most LINES: a stranger's own ones first, then the usual choice."""
    swept = [
        name
        for name in named(rows)[1]
        if (found := gathered(rows, attack, rule, name)) and all(row.get("front") for row in found.values())
    ]
    own = [name for name in swept if name not in DEFENCES]
    usual = [name for name in LABELS if name in swept]
    return (own + usual)[:LINES] or swept[:LINES]


def label(name: str) -> str:
    return LABELS.get(name, name)


def _to_the_data(axes: Axes, paths: Mapping[str, Sequence[tuple[float, float]]], start: Point, limit: float) -> None:
    """The part where accuracy is worth having, and as much to the left of it for names; what falls below leaves it."""
    right = max(accuracy for points in paths.values() for accuracy, _ in points)
    room = max(right - limit, 0.02)
    axes.set_xlim(limit - 0.9 * room, right + 0.08 * room)
    axes.set_ylim(-0.03, 1.08 * max(start[1], 0.05) + 0.03)


def _names(axes: Axes, chosen: Mapping[str, tuple[float, float]]) -> None:
    """Each defense's name and ASR beside its chosen point, in its color."""
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    low, high = axes.get_ylim()
    places = pictures.apart([(asr - low) / (high - low) for _, asr in chosen.values()], 0.06, top=0.9)
    for (name, point), place in zip(chosen.items(), places, strict=True):
        axes.annotate(
            f"{label(name)}: {100 * point[1]:.0f} %",
            point,
            (0.03, max(place, 0.04)),
            textcoords="axes fraction",
            color=colors[name],
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.6, "shrinkB": 5},
        )


def _base(axes: Axes, plain: ByCell, shrunk: ByCell) -> None:
    """The base model: a point where its accuracy was measured (shrinking by 1), else a line at its test ASR."""
    whole = [row["front"]["1"] for row in shrunk.values() if "1" in row.get("front", {})]
    if whole and len(whole) == len(shrunk):
        axes.plot(*middle(whole), "D", color="black", markersize=7, zorder=5)
        axes.set_xlim(left=min(axes.get_xlim()[0], middle(whole)[0] - 0.005))
        axes.annotate("base", middle(whole), (8, -4), textcoords="offset points", fontsize=10)
        return
    asr = fmean(fraction(row["draws"][0]["base"]) for row in plain.values()) / 100
    axes.axhline(asr, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"base\n{100 * asr:.1f} %\n(test)", (1.01, asr), xycoords=("axes fraction", "data"), va="center", fontsize=9
    )


def middle(points: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The mean accuracy and the mean ASR."""
    return fmean(point["accuracy"] for point in points), fmean(point["asr"] for point in points)


# --- figures of a row, in per cent; a row of twins is the mean of its draws ------------------------------------------


def asr(row: Row) -> float:
    return over_draws(row, lambda draw: fraction(draw["asr"]))


def base_asr(row: Row) -> float:
    """Of the base model, under the same trigger."""
    return over_draws(row, lambda draw: fraction(draw["base"]))


def control(row: Row) -> float:
    return over_draws(row, lambda draw: fraction(draw["clean_merge"]))


def accuracy(row: Row) -> float:
    return over_draws(row, lambda draw: sum(map(fraction, draw["accuracy"].values())) / len(draw["accuracy"]))


def own_task(row: Row) -> float:
    return over_draws(row, lambda draw: fraction(draw["accuracy"][row["task"]]))


def over_draws(row: Row, value: Callable[[Any], float]) -> float:
    return sum(map(value, row["draws"])) / len(row["draws"])


def fraction(counts: tuple[int, int]) -> float:
    hits, n = counts
    return 100 * hits / n
