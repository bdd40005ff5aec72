"""Tables of the second edition: every defense at equal utility, beside the base and its controls."""

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from statistics import fmean
from typing import Any, NamedTuple

from taskvec.metrics import Estimate, estimate

from .report import text_table
from .significance import holm, sign_flip

GAINS = (0.9, 0.75, 0.5)
CONTROLS, NONE, ORACLE = "controls", "none", "oracle"
OURS = "bank: disarm"
RIVALS = ("ship the base", "shrinking", "clipping", "IBVS, the bank's probe")
AT = 0.9  # the retained gain of the primary comparison
LABELS = {"stealthy": "stealthy BadMerging-on", "noisy": "noisy BadMerging-on"}
WITHIN = 0.01  # of the best validation accuracy that a defense reaches: the rule for its strength

Row = Mapping[str, Any]
Rows = Mapping[tuple[Any, str], Row]
"""(cell, defense) -> row."""


def fraction(counts: Sequence[int]) -> float:
    return counts[0] / counts[1]


def accuracy(point: Row, part: str, task: str | None = None) -> float:
    """Of one task, or the mean over tasks."""
    return fraction(point[part][task]) if task else fmean(map(fraction, point[part].values()))


class Reference(NamedTuple):
    """What gains are measured between, of one cell.

    Attributes:
        base: the base's accuracy on the task.
        clean: that of the all-clean merge.
        base_asr: of the base.
        base_mean: the base's mean accuracy over tasks.
    """

    base: float
    clean: float
    base_asr: float
    base_mean: float = float("nan")

    def gain(self, accuracy: float) -> float:
        """The retained gain; not a number where the all-clean merge gains nothing."""
        return (accuracy - self.base) / (self.clean - self.base) if self.clean > self.base else float("nan")


def controls(rows: Rows, cell: Any) -> Row:
    """The base and the clean single model, which no merge has a part in."""
    return next(row for (c, n), row in rows.items() if n == CONTROLS and c._replace(rule=cell.rule) == cell)


def reference(rows: Rows, cell: Any, task: str) -> Reference:
    base, clean = controls(rows, cell)["base"], rows[cell, NONE]["clean"]["0"]
    return Reference(
        accuracy(base, "test", task), accuracy(clean, "test", task), fraction(base["asr"]), accuracy(base, "test")
    )


def points(row: Row, known: Reference, task: str) -> list[tuple[float, float]]:
    """(retained gain of the task, ASR) by strength, on test rows."""
    return [(known.gain(accuracy(p, "test", task)), fraction(p["asr"])) for p in row["front"].values()]


def at_gain(front: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The lowest ASR on a front where at least so much is retained; between neighbors it is linear; None if nowhere."""
    found = [asr for gain, asr in front if gain >= wanted]
    for (g0, a0), (g1, a1) in pairwise(front):
        if (g0 >= wanted) != (g1 >= wanted):
            found.append(a0 + (a1 - a0) * (wanted - g0) / (g1 - g0))
    return min(found, default=None)


def chosen(row: Row) -> Row:
    """The point at the largest strength whose validation accuracy is within a point of the best one."""
    reached = {by: accuracy(p, "validation") for by, p in row["front"].items()}
    best = max(reached.values())
    return row["front"][max((by for by, a in reached.items() if a >= best - WITHIN), key=float)]


def whole_front(rows: Rows, cell: Any, name: str) -> Row:
    """A defense's row with the untouched merge as its first point: no defense may be worse than none."""
    row, untouched = rows[cell, name], rows[cell, NONE]["front"]["0"]
    return {**row, "front": {"0": untouched, **{by: p for by, p in row["front"].items() if by != "0"}}}


def value_at(rows: Rows, cell: Any, name: str, wanted: float, task: str) -> tuple[float, bool]:
    """ASR in per cent at a retained gain, and whether the defense reaches it; if not, that of no defense."""
    known = reference(rows, cell, task)
    if name == "ship the base":
        return 100 * known.base_asr, False
    found = at_gain(points(whole_front(rows, cell, name), known, task), wanted)
    if found is None:
        return 100 * fraction(rows[cell, NONE]["front"]["0"]["asr"]), False
    return 100 * found, True


def by_world(values: Mapping[Any, float]) -> list[float]:
    """Means over targets, one for each world: the clusters."""
    worlds = dict.fromkeys(cell.world for cell in values)
    return [fmean(v for cell, v in values.items() if cell.world == world) for world in worlds]


def by_base(values: Mapping[Any, float]) -> list[float]:
    bases = dict.fromkeys(cell.world.base for cell in values)
    return [fmean(v for cell, v in values.items() if cell.world.base == base) for base in bases]


def interval(values: Sequence[float]) -> Estimate | str:
    return estimate(values) if len(values) > 1 else f"{values[0]:.1f}"


def base_line(known: Sequence[Reference]) -> list[object]:
    """Shipping the base, which retains nothing."""
    means = [100 * fmean(values) for values in zip(*((k.base_asr, k.base, k.base_mean) for k in known), strict=True)]
    return ["ship the base", f"{means[0]:.1f}", "0", *(f"{m:.1f}" for m in means[1:]), *["-"] * 6, len(known)]


def defence_line(rows: Rows, cells: Sequence[Any], name: str, task: str) -> list[object]:
    """A defense at its chosen strength, and at equal utility."""
    points_taken = {c: chosen(whole_front(rows, c, name)) for c in cells}
    own = {c: accuracy(p, "test", task) for c, p in points_taken.items()}
    gains = [reference(rows, c, task).gain(a) for c, a in own.items()]
    at_gains: list[object] = []
    for wanted in GAINS:
        found = {c: value_at(rows, c, name, wanted, task) for c in cells}
        at_gains += [interval(by_world({c: v for c, (v, _) in found.items()})), sum(ok for _, ok in found.values())]
    return [
        name,
        interval(by_world({c: 100 * fraction(p["asr"]) for c, p in points_taken.items()})),
        f"{100 * fmean(gains):.0f}",
        f"{100 * fmean(own.values()):.1f}",
        f"{100 * fmean(accuracy(p, 'test') for p in points_taken.values()):.1f}",
        *at_gains,
        len(cells),
    ]


def defences_table(rows: Rows, names: Sequence[str], attack: str, rule: str, task: str) -> str:
    """A line for each defense under one attack and merge."""
    cells = [c for c, n in rows if n == NONE and (c.attack, c.rule) == (attack, rule)]
    known = [reference(rows, c, task) for c in cells]
    measured = {name: own for name in names if (own := [c for c in cells if (c, name) in rows])}
    body = [base_line(known), *(defence_line(rows, own, name, task) for name, own in measured.items())]
    at_gains = (x for g in GAINS for x in (f"at {100 * g:.0f} %", "reached"))
    header = ["defence", "ASR", "kept %", "own", "mean", *at_gains, "merges"]
    untouched = [rows[c, NONE] for c in cells]
    twin = fmean(100 * fraction(row["clean"]["0"]["asr"]) for row in untouched)
    single = fmean(100 * fraction(controls(rows, c)["clean model"]["asr"]) for c in cells)
    size = f"{len({c.world for c in cells})} worlds x {len({c.target for c in cells})} targets"
    title = (
        f"{LABELS.get(attack, attack)}, {task}, {rule}: {size}, n = {untouched[0]['front']['0']['asr'][1]}; "
        f"all-clean merge: {100 * fmean(k.clean for k in known):.1f} % on the task, ASR {twin:.1f}; "
        f"clean single model: ASR {single:.1f};\n"
        "ASR, retained gain, accuracy on the task and mean over tasks at the chosen strength; then ASR where so much\n"
        "of the task's gain is retained, and in how many merges it can be; per cent, 95 % t intervals over worlds"
    )
    return text_table(title, header, body)


def leaderboard(rows: Rows, given: Mapping[str, str], task: str) -> str:
    """A table for each attack and merge: defenses, the lowest ASR at the primary comparison's gain first.

    What ran in fewer merges comes behind that, and the oracle, a bound and no defense, last of all.

    Args:
        rows: as of the other tables.
        given: defense -> what it is given.
        task: the attacked one.
    """
    ranks = dict.fromkeys((c.attack, c.rule) for c, n in rows if n == NONE)
    return "\n".join(ranking(rows, given, attack, rule, task) for attack, rule in ranks)


def ranking(rows: Rows, given: Mapping[str, str], attack: str, rule: str, task: str) -> str:
    cells = [c for c, n in rows if n == NONE and (c.attack, c.rule) == (attack, rule)]
    lines: dict[tuple[bool, int, float, str], list[object]] = {}
    for name, means in given.items():
        own = [c for c in cells if (c, name) in rows]
        if own:
            at_gain = {c: value_at(rows, c, name, AT, task) for c in own}
            place = (name == ORACLE, -len(own), fmean(asr for asr, _ in at_gain.values()), name)
            lines[place] = [name, *ranked_line(rows, name, at_gain, task), means]
    shipped = fmean(100 * reference(rows, c, task).base_asr for c in cells)
    base = [RIVALS[0], "-", f"0 of {len(cells)}", f"{shipped:.1f}", "0", "the base"]
    at = f"at {100 * AT:.0f} %"
    header = ["defence", at, "reached", "chosen", "kept %", "given"]
    return text_table(
        f"{LABELS.get(attack, attack)}, {task}, {rule}", header, [base, *(lines[place] for place in sorted(lines))]
    )


def ranked_line(rows: Rows, name: str, at_gain: Mapping[Any, tuple[float, bool]], task: str) -> list[object]:
    """ASR at the gain, in how many merges that is reached, ASR and retained gain at the chosen strength."""
    taken = {c: chosen(whole_front(rows, c, name)) for c in at_gain}
    kept = fmean(reference(rows, c, task).gain(accuracy(p, "test", task)) for c, p in taken.items())
    return [
        interval(by_world({c: asr for c, (asr, _) in at_gain.items()})),
        f"{sum(ok for _, ok in at_gain.values())} of {len(at_gain)}",
        interval(by_world({c: 100 * fraction(p["asr"]) for c, p in taken.items()})),
        f"{100 * kept:.0f}",
    ]


def primary_table(rows: Rows, attack: str, task: str) -> str:
    """The family of tests that was written down: ours minus each rival at a retained gain of 90 %."""
    found: dict[tuple[str, str], tuple[list[float], list[float], str]] = {}
    for rule, rival in product(dict.fromkeys(c.rule for c, _ in rows), RIVALS):
        cells = [
            c
            for c, n in rows
            if n == OURS and (c.attack, c.rule) == (attack, rule) and ((c, rival) in rows or rival == RIVALS[0])
        ]
        if not cells:
            continue
        both = {c: [value_at(rows, c, name, AT, task) for name in (OURS, rival)] for c in cells}
        values = {c: ours[0] - theirs[0] for c, (ours, theirs) in both.items()}
        counts = [sum(pair[i][1] for pair in both.values()) for i in (0, 1)]
        reached = f"{counts[0]}, {counts[1]} of {len(both)}"
        found[rule, rival] = by_world(values), by_base(values), reached
    corrected = holm({name: sign_flip(worlds) for name, (worlds, _, _) in found.items()})
    body = [
        [rule, rival, interval(worlds), interval(bases), f"{corrected[rule, rival]:.4f}", reached]
        for (rule, rival), (worlds, bases, reached) in found.items()
    ]
    title = f"{attack}: ASR of '{OURS}' minus the rival's where {100 * AT:.0f} % of the task's gain is retained, points"
    return text_table(title, ["merge", "rival", "over worlds", "over bases", "p (Holm)", "reached"], body)


def flags_table(rows: Rows, attack: str, task: str) -> str:
    """Whom the bank flags, by merges."""
    own = [row for (c, n), row in rows.items() if n == OURS and c.attack == attack and c.rule == "task arithmetic"]
    if not own:
        return ""
    right, more = sum(task in row["flagged"] for row in own), sum(bool(set(row["flagged"]) - {task}) for row in own)
    return (
        f"\n{attack}: the bank flags the attacker in {right} of {len(own)} merges, somebody else in {more}; "
        f"somebody in {sum(bool(row['false']) for row in own)} of {len(own)} all-clean merges"
    )


def tables(rows: Rows, names: Sequence[str], task: str) -> str:
    """Everything that is there."""
    whole = {key: row for key, row in rows.items() if key[1] == CONTROLS or (key[0], NONE) in rows}
    attacks = list(dict.fromkeys(c.attack for c, n in whole if n == NONE))
    parts = [primary_table(whole, attack, task) + flags_table(whole, attack, task) for attack in attacks]
    rules = list(dict.fromkeys(c.rule for c, n in whole if n == NONE))
    parts += [defences_table(whole, names, attack, rule, task) for attack in attacks for rule in rules]
    return "\n".join(parts)
