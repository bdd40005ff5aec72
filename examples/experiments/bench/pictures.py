"""The pictures of the backdoor study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # files only, no window

import matplotlib.pyplot as plt

COLOURS = {
    "IBVS": "tab:blue",
    "WAG": "tab:green",
    "shrinking": "tab:orange",
    "oracle": "tab:red",
}


def ladder(path: Path, figures: Mapping[str, Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]]) -> None:
    """One panel for each figure: ASR by merge, and the all-clean control of the same trigger as a tick or dotted line.

    At the right of a bar stands what the attack costs the merge, in points of accuracy.
    """
    panels, axes = plt.subplots(4, 3, figsize=(13, 14.5))
    for axis, (title, by_rule) in zip(axes.flat, figures.items(), strict=False):
        bars = next(iter(next(iter(by_rule.values())).values()))[0]["x"] is None
        (_bars if bars else _lines)(axis, by_rule)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(figures) :]:
        axis.set_axis_off()
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    _save(panels, path, tight=True)


RULES = {"task arithmetic": "tab:blue", "TIES": "tab:red"}


def _bars(axis: plt.Axes, by_rule: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    for i, (rule, lines) in enumerate(by_rule.items()):
        places = [j + 0.4 * i for j in range(len(lines))]
        values = [points[0]["asr"] for points in lines.values()]
        halves = [value["half"] or 0.0 for value in values]
        axis.barh(places, [value["mean"] for value in values], 0.36, color=RULES[rule], label=rule, xerr=halves)
        controls = [points[0]["control"]["mean"] for points in lines.values()]
        label = "the same trigger, all-clean" if i == 0 else None
        axis.plot(controls, places, "|", color="black", markersize=9, label=label)
        for place, points in zip(places, lines.values(), strict=True):
            axis.text(103, place, f"{points[0]['cost']['mean']:+.1f}", fontsize=7, va="center")
        axis.set_yticks([j + 0.2 for j in range(len(lines))], list(lines), fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="ASR, %", xlim=(0, 119), xticks=range(0, 101, 25))


def _lines(axis: plt.Axes, by_rule: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    for rule, lines in by_rule.items():
        for (label, points), style in zip(lines.items(), ("-", "--"), strict=False):
            x, mean = [point["x"] for point in points], [point["asr"]["mean"] for point in points]
            halves = [point["asr"]["half"] or 0.0 for point in points]
            axis.errorbar(x, mean, halves, fmt=f"o{style}", color=RULES[rule], markersize=3, capsize=2)
            if len(lines) > 1 and rule == "TIES":
                axis.plot([], [], style, color="black", label=label)
            axis.plot(x, [point["control"]["mean"] for point in points], ":", color=RULES[rule], linewidth=1)
    axis.set(ylabel="ASR, %", ylim=(-3, 103))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _save(figure: plt.Figure, path: Path, *, tight: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
