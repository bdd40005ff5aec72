"""The pictures of the backdoor study."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from torch import Tensor

mpl.use("agg")  # files only, no window

import matplotlib.pyplot as plt

Points = Mapping[str, Mapping[str, float]]  # strength -> accuracy and ASR
COLOURS = {
    "IBVS": "tab:blue",
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


def injection(path: Path, curves: Mapping[str, Points], control: float, title: str) -> None:
    """ASR and accuracy of `clean + lambda * BV` over lambda: one line for each seed."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for what, label, colour in (("accuracy", "accuracy", "tab:blue"), ("asr", "ASR", "tab:red")):
        for i, points in enumerate(curves.values()):
            style = {"color": colour, "marker": "os^"[i], "markersize": 4, "alpha": 0.7, "label": f"{label}, seed {i}"}
            axis.plot([float(by) for by in points], [point[what] for point in points.values()], **style)
    axis.axhline(control, color="black", linestyle=":", linewidth=1, label="ASR on the base")
    axis.set(xlabel="λ", ylim=(-0.03, 1.03), title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.55))
    _save(figure, path)


def fronts(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, Points]]], keep: float) -> None:
    """Accuracy against ASR as each defence grows stronger: attacks down, merges across; lines start undefended."""
    merges = list(next(iter(panels.values())))
    size = (3.7 * len(merges), 2.9 * len(panels) + 0.6)
    figure, axes = plt.subplots(len(panels), len(merges), figsize=size, sharex="col", sharey=True, squeeze=False)
    for line, (attack, across) in zip(axes, panels.items(), strict=True):
        for axis, defences in zip(line, across.values(), strict=True):
            _front(axis, defences, keep)
        line[0].set_ylabel(f"{attack}\nASR")
    for i, how in enumerate(merges):
        axes[0][i].set_title(how)
        axes[-1][i].set_xlabel("accuracy, mean of five tasks")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.5 / size[1], 1, 1))
    _save(figure, path)


def _front(axis: plt.Axes, defences: Mapping[str, Points], keep: float) -> None:
    for name, points in defences.items():
        x, y = ([point[what] for point in points.values()] for what in ("accuracy", "asr"))
        style = "--" if name == "oracle" else "-"
        axis.plot(x, y, style, color=COLOURS[name], marker="o", markersize=3, linewidth=1.2, label=name)
    start = next(iter(defences.values()))["0"]
    axis.plot(start["accuracy"], start["asr"], "*", color="black", markersize=11, zorder=5, label="no defence")
    limit = keep * start["accuracy"]
    axis.axvline(limit, color="black", linestyle=":", linewidth=1, label=f"{keep:.0%} of its accuracy")
    axis.set_ylim(-0.04, 1.04)
    axis.grid(alpha=0.3)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
