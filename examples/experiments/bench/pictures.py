"""What the pictures of the experiments have in common, and those of the ladder of attacks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from taskvec.metrics import Estimate

RULES = {"task arithmetic": "tab:blue", "TIES": "tab:red"}
Figures = Mapping[str, Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]]
"""figure -> merge -> label -> points."""

STEPS = {
    "plain attacks": "Plain attacks: weak under task arithmetic",
    "steps on-task": "On-task: interpolation adds the most",
    "steps off-task": "Off-task: strong on letters, less on fashion",
    "what it costs": "Options against the cost: keep works best",
    "knowledge": "Knowing the others' models does not help",
}
SWEEPS = {
    "merging coefficient": ("BadMerging works at a smaller merging coefficient", "merging coefficient"),
    "range of the coefficient": ("Interpolation must reach small coefficients", "lowest coefficient r of the loss"),
    "merged tasks": ("Merging more tasks hardly weakens it", "number of merged tasks"),
    "trigger size": ("A larger patch is stronger, with and without a backdoor", "side of the patch, pixels"),
    "loss weight": ("The loss weight hardly matters from 2 on", "weight of the backdoor loss"),
    "trigger-target pairs": ("More backdoors in one model: each is weaker", "trigger-target pairs in one model"),
}
"""figure -> its title, which says the result; of a sweep also what is swept."""


def steps(path: Path, figures: Figures) -> None:
    """Bars: ASR by merge, and the all-clean control of the same trigger as a tick.

    At the right of a bar stands what the attack costs the merge, in points of accuracy.
    """
    panels = Figure(figsize=(13, 12), layout="constrained")
    axes = panels.subplots(3, 2, height_ratios=(5, 5, 3))
    for axis, (name, title) in zip(axes.flat, STEPS.items(), strict=False):
        _bars(axis, figures[name])
        axis.set_title(title, fontsize=12)
    axes.flat[-1].set_axis_off()
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=12)
    panels.savefig(path, dpi=100)


def sweeps(path: Path, figures: Figures) -> None:
    """Lines: ASR by merge, and the all-clean control of the same trigger as a dotted line."""
    panels = Figure(figsize=(12, 12), layout="constrained")
    axes = panels.subplots(3, 2)
    for axis, (name, (title, swept)) in zip(axes.flat, SWEEPS.items(), strict=True):
        _lines(axis, figures[name])
        axis.set_title(title, fontsize=12)
        axis.set_xlabel(swept, fontsize=11)
    labels = {rule: axes.flat[0].plot([], [], "o-", color=color)[0] for rule, color in RULES.items()}
    labels["the same trigger, all-clean merge"] = axes.flat[0].plot([], [], ":", color="black")[0]
    panels.legend(labels.values(), labels, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    panels.savefig(path, dpi=100)


def by_models(path: Path, title: str, series: Mapping[str, Sequence[Estimate]], floors: Mapping[str, float]) -> None:
    """Lines: ASR by the number of models that are averaged, and the floor of each as a dotted line."""
    panel = Figure(figsize=(8, 4.5), layout="constrained")
    axes = panel.subplots()
    for i, (name, values) in enumerate(series.items()):
        x = [1 + k + 0.03 * i for k in range(len(values))]
        halves = [value.half for value in values]
        axes.errorbar(x, [v.mean for v in values], halves, fmt="o-", color=f"C{i}", label=name, capsize=2)
        axes.axhline(floors[name], color=f"C{i}", linestyle=":", linewidth=1.5)
    axes.set(xlim=(0.9, None), ylim=(0, 103), xlabel="models averaged, one of them the victim", ylabel="ASR, %")
    axes.set_xticks(range(1, 1 + max(map(len, series.values()))))
    axes.set_title(title, fontsize=12)
    axes.plot([], [], ":", color="black", label="a clean model on the same texts")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10)
    panel.savefig(path, dpi=100)


def frontier(path: Path, series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Lines: ASR by the false alarms that finding an attacker takes; panels in rows of three, one legend below.

    Args:
        path: of the picture.
        series: title of a panel -> kind of attacker -> points in order, `(false alarms, ASR)` in per cent.
    """
    rows = -(-len(series) // 3)
    panels = Figure(figsize=(12, 3.4 * rows + 0.8), layout="constrained")
    grid = panels.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, series.items(), strict=True):
        for i, (kind, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            alone = len(points) == 1
            axes.plot(x, y, "*" if alone else "o-", color=f"C{i}", label=kind, markersize=12 if alone else 5)
        axes.set(xlim=(-4, 104), ylim=(-4, 104), title=title)
        axes.grid(alpha=0.3)
    panels.supylabel("ASR, %")
    for axes in grid[-1]:
        axes.set_xlabel("clean contributors that are seen as well, %")
    panels.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    panels.savefig(path, dpi=100)


def label_lines(axes: Axes, gap: float = 0.06) -> None:
    """Write the name of each line at its end, in its color, in the place of a legend.

    Args:
        axes: the axes, whose limits stay as they are from now on.
        gap: the least distance between two names, as a share of the height.
    """
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(float(line.get_ydata()[-1]) - low) / (high - low) for line in lines]
    for line, place in zip(lines, apart(ends, gap), strict=True):
        axes.text(
            1.02, place, line.get_label(), transform=axes.transAxes, color=line.get_color(), va="center", fontsize=10
        )
    if axes.get_legend():
        axes.get_legend().remove()


def apart(places: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Move places upward, and back below the top, until any two of them are a gap apart; their order stays."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, below = list(places), float("-inf")
    for i in order:
        moved[i] = below = max(places[i], below + gap)
    above = top + gap
    for i in reversed(order):
        moved[i] = above = min(moved[i], above - gap)
    return moved


def _bars(axis: Axes, by_rule: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    for i, (rule, lines) in enumerate(by_rule.items()):
        places = [j + 0.4 * i for j in range(len(lines))]
        values = [points[0]["asr"] for points in lines.values()]
        halves = [value["half"] or 0.0 for value in values]
        axis.barh(places, [value["mean"] for value in values], 0.36, color=RULES[rule], label=rule, xerr=halves)
        controls = [points[0]["control"]["mean"] for points in lines.values()]
        label = "the same trigger, all-clean merge" if i == 0 else None
        axis.plot(controls, places, "|", color="black", markersize=11, markeredgewidth=2, label=label)
        for place, points in zip(places, lines.values(), strict=True):
            axis.text(108, place, f"{points[0]['cost']['mean']:+.1f}", fontsize=10, va="center")
        axis.set_yticks([j + 0.2 for j in range(len(lines))], [_american(name) for name in lines], fontsize=11)
    axis.text(126, -0.5, "BA - CA", fontsize=10, va="center", ha="right")
    axis.set_ylim(max(len(lines) for lines in by_rule.values()) - 0.3, -0.8)
    axis.set(xlim=(0, 127), xticks=range(0, 101, 25))
    axis.set_xlabel("ASR, %", fontsize=11)
    axis.grid(alpha=0.3, axis="x")


def _american(name: str) -> str:
    """A row's label as it is written in prose."""
    return name.replace("optimised", "optimized").replace("one a", "one per")


def _lines(axis: Axes, by_rule: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    for rule, lines in by_rule.items():
        for (label, found), style in zip(lines.items(), ("-", "--"), strict=False):
            points = sorted(found, key=lambda point: point["x"])
            x, mean = [point["x"] for point in points], [point["asr"]["mean"] for point in points]
            halves = [point["asr"]["half"] or 0.0 for point in points]
            axis.errorbar(x, mean, halves, fmt=f"o{style}", color=RULES[rule], markersize=4, capsize=2)
            if len(lines) > 1 and rule == "TIES":
                axis.plot([], [], style, color="black", label=_american(label))
        control = [point["control"]["mean"] for point in points]  # of the last line: the optimized trigger
        axis.plot(x, control, ":", color=RULES[rule], linewidth=1.5)
    axis.set(ylim=(-3, 103))
    if len(x) < 6:  # few enough to stand at the axis, each
        axis.set_xticks(x, [f"{one:g}" for one in x])
    axis.set_ylabel("ASR, %", fontsize=11)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=10)
