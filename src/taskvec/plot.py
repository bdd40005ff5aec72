"""Plots of the results of `metrics` and `defenses`. Requires matplotlib: `pip install taskvec[plot]`.

Each function draws into the given axes, or into those of a new figure, and returns them; set titles and sizes on them,
and save their figure: `heat_map(cosine_matrix(vectors), names).figure.savefig("cosines.png")`
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .errors import DegenerateError, MismatchError, OptionError
from .metrics import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["curve", "front", "heat_map", "strip"]

COLOURS = 10  # until matplotlib's begin again

Point = tuple[float, float]


def heat_map(
    matrix: Tensor,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    digits: int = 2,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draw a matrix as colors with its numbers: cosines, sign agreement, transfer.

    Args:
        matrix: `(n, m)`, such as the result of `metrics.cosine_matrix` or `metrics.transfer_matrix`.
        rows: n names.
        columns: m names; by default those of the rows.
        limits: the values of the first and last color; by default the smallest and largest.
        digits: digits after the decimal point.
        axes: the axes to draw into.

    Returns:
        The axes.

    Raises:
        MismatchError: not one name per row and column.
        OptionError: matplotlib is not installed.

    Examples:
        >>> import torch
        >>> heat_map(torch.eye(2), ["a", "b"]).get_images()[0].get_array().shape
        (2, 2)
    """
    across = rows if columns is None else columns
    if tuple(matrix.shape) != (len(rows), len(across)):
        raise MismatchError(
            f"names must match the rows and columns of {tuple(matrix.shape)}; got {len(rows)} and {len(across)} names"
        )
    own = _axes(axes)
    low, high = limits or (None, None)
    values: list[list[float]] = [[float(x) for x in row] for row in matrix]
    image = own.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            light = image.norm(value) < 0.6
            own.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color="white" if light else "black")
    own.set_xticks(range(len(across)), across, rotation=45, ha="right", rotation_mode="anchor")
    own.set_yticks(range(len(rows)), rows)
    return own


def curve(
    lines: Mapping[str, Mapping[float, float | Sequence[float]]],
    *,
    xlabel: str = "coefficient",
    ylabel: str = "ASR",
    axes: "Axes | None" = None,
) -> "Axes":
    """Draw values over a scale, with 95 % t intervals where there are several per point: injection curves.

    Args:
        lines: name -> scale -> a value, or one per seed.
        xlabel: label of the scale.
        ylabel: label of the values.
        axes: the axes to draw into.

    Returns:
        The axes.

    Raises:
        DegenerateError: no lines, or a point without values.
        NonFiniteError: a value that is NaN or inf.
        OptionError: matplotlib is not installed.

    Examples:
        >>> axes = curve({"ViT": {0.0: [0.1, 0.2], 1.0: [0.9, 1.0]}})
        >>> len(axes.get_lines())
        1
    """
    if not lines:
        raise DegenerateError("lines must not be empty; got no lines to draw")
    own = _axes(axes)
    for name, points in lines.items():
        by_scale = {s: [v] if isinstance(v, int | float) else [float(x) for x in v] for s, v in points.items()}
        if empty := [s for s, values in by_scale.items() if not values]:
            raise DegenerateError(f"every point must have a value; got {name!r} with no values at {empty[0]!r}")
        found = [estimate(values) for values in by_scale.values()]
        (line,) = own.plot(list(by_scale), [point.mean for point in found], "o-", markersize=3, label=name)
        low, high = ([point.mean + sign * (point.half or 0.0) for point in found] for sign in (-1, 1))
        own.fill_between(list(by_scale), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    own.set(xlabel=xlabel, ylabel=ylabel)
    own.grid(alpha=0.3)
    own.legend()
    return own


def front(
    paths: Mapping[str, Sequence[Point]],
    *,
    undefended: Point | None = None,
    limit: float | None = None,
    chosen: Mapping[str, Point] | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draw accuracy against attack success rate (ASR) as defenses grow stronger: better is down and to the right.

    Args:
        paths: defense -> (accuracy, ASR), from the weakest strength to the strongest.
        undefended: the point of the undefended model, where all paths begin.
        limit: the accuracy that must be kept, drawn as a line.
        chosen: defense -> the chosen point, which is marked.
        axes: the axes to draw into.

    Returns:
        The axes.

    Raises:
        DegenerateError: nothing to draw.
        OptionError: matplotlib is not installed.

    Examples:
        >>> path = [(0.80, 0.9), (0.78, 0.5)]
        >>> axes = front({"shrinking": path}, undefended=(0.8, 1.0), limit=0.784)
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('accuracy', 'ASR')
    """
    if not paths:
        raise DegenerateError("paths must not be empty; got no defenses to draw")
    own = _axes(axes)
    for i, (name, points) in enumerate(paths.items()):
        whole = [*([undefended] if undefended else []), *points]
        style = "o-" if i < COLOURS else "o:"
        (line,) = own.plot([a for a, _ in whole], [r for _, r in whole], style, markersize=3, linewidth=1, label=name)
        if chosen and name in chosen:
            own.plot(*chosen[name], "s", markersize=8, fillstyle="none", color=line.get_color())
    if undefended:
        own.plot(*undefended, "*", color="black", markersize=11, zorder=5, label="no defense")
    if limit is not None:
        own.axvline(limit, color="black", linestyle=":", linewidth=1)
    own.set(xlabel="accuracy", ylabel="ASR")
    own.grid(alpha=0.3)
    own.legend()
    return own


def strip(groups: Mapping[str, Sequence[float]], *, xlabel: str = "", axes: "Axes | None" = None) -> "Axes":
    """Draw every value of several groups as a dot, one row per group, such as the screening statistics of contributors.

    Args:
        groups: name -> values.
        xlabel: label of the values.
        axes: the axes to draw into.

    Returns:
        The axes.

    Raises:
        DegenerateError: nothing to draw.
        OptionError: matplotlib is not installed.

    Examples:
        >>> axes = strip({"clean": [0.1, 0.2], "BadNets": [0.4]}, xlabel="score")
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['clean', 'BadNets']
    """
    if not groups:
        raise DegenerateError("groups must not be empty; got no groups to draw")
    own = _axes(axes)
    for i, values in enumerate(groups.values()):
        own.plot(list(values), [i] * len(values), "o", markersize=5, alpha=0.4, markeredgewidth=0)
    own.set_yticks(range(len(groups)), list(groups))
    own.set_xlabel(xlabel)
    own.invert_yaxis()
    own.grid(alpha=0.3, axis="x")
    return own


def _axes(given: "Axes | None") -> Any:
    """The axes to draw into. Matplotlib's own types are left out of the checks: it is an extra."""
    if given is not None:
        return given
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as missing:
        raise OptionError(
            "plots require matplotlib, which is not installed; use pip install 'taskvec[plot]'"
        ) from missing
    return cast("Any", Figure(layout="constrained")).subplots()
