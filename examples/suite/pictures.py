"""The pictures of the backdoor study."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from torch import Tensor

from .bench import Point

mpl.use("agg")  # files only, no window

import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    "none": "black",
    "IBVS": "tab:blue",
    "random vector": "tab:gray",
    "shuffled probe": "tab:olive",
    "WAG": "tab:green",
    "shrinking": "tab:orange",
    "oracle": "tab:red",
}


def triggers(path: Path, rows: Mapping[str, Tensor]) -> None:
    """One row of images (n, 1, 28, 28) for each name: the clean ones, and the same under each trigger."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns, 1.06 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    _save(figure, path)


def injection(path: Path, curves: Mapping[str, Mapping[float, Point]], control: float, title: str) -> None:
    """ASR and accuracy of `clean + lambda * BV` over lambda: one line for each seed."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for i, (name, curve) in enumerate(curves.items()):
        style = {"marker": "o", "markersize": 3.5, "alpha": 1 - 0.3 * i}
        axis.plot(list(curve), [p.asr for p in curve.values()], color="tab:red", label=f"ASR, {name}", **style)
        axis.plot(list(curve), [p.accuracy for p in curve.values()], color="tab:blue", label=f"accuracy, {name}", **style)
    axis.axhline(control, color="black", linestyle=":", linewidth=1, label="ASR on the base model")
    axis.set(xlabel="λ", ylim=(-0.03, 1.03), title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center right")
    _save(figure, path)


def fronts(path: Path, panels: Mapping[tuple[str, str], Mapping[str, Mapping[float, Point]]], keep: float) -> None:
    """Accuracy against ASR as each defence grows stronger: attacks down, merges across; the line starts undefended."""
    attacks, merges = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    size = (3.7 * len(merges), 2.9 * len(attacks) + 0.6)
    figure, axes = plt.subplots(len(attacks), len(merges), figsize=size, sharex="col", sharey=True, squeeze=False)
    for (attack, how), lines in panels.items():
        axis = axes[attacks.index(attack)][merges.index(how)]
        _front(axis, lines, keep)
        if attack == attacks[0]:
            axis.set_title(how)
        if attack == attacks[-1]:
            axis.set_xlabel("accuracy, mean of five tasks")
        if how == merges[0]:
            axis.set_ylabel(f"{attack}\nASR")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.6 / size[1], 1, 1))
    _save(figure, path, tight=False)


def _front(axis: plt.Axes, lines: Mapping[str, Mapping[float, Point]], keep: float) -> None:
    for name, points in lines.items():
        x, y = [p.accuracy for p in points.values()], [p.asr for p in points.values()]
        style = "--" if name == "oracle" else "-"
        axis.plot(x, y, style, color=COLOURS[name], marker="o", markersize=3, linewidth=1.2, label=name)
    start = next(iter(lines.values()))[0.0]
    axis.plot(start.accuracy, start.asr, "*", color="black", markersize=11, zorder=5, label="no defence")
    axis.axvline(keep * start.accuracy, color="black", linestyle=":", linewidth=1, label=f"{keep:.0%} of its accuracy")
    axis.set_ylim(-0.04, 1.04)
    axis.grid(alpha=0.3)


def _save(figure: plt.Figure, path: Path, tight: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight" if tight else None)
    plt.close(figure)
