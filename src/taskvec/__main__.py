"""The command line: `python -m taskvec inspect A [B]` and `python -m taskvec diff BASE TUNED -o vector.safetensors`."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from ._engine.lazy import source_of
from ._engine.run import measure
from ._engine.sources import Source, Spec
from ._files.hub import Remote
from ._files.load import load
from ._files.save import save
from ._vectors.measures import squares
from ._vectors.vector import TaskVector
from .errors import TaskvecError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (TaskvecError, OSError) as error:
        print(f"taskvec: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m taskvec", description="Look at checkpoints and take differences.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    place = "a file, a folder, or a name on the Hub (org/name[@revision])"

    inspect = commands.add_parser("inspect", help="names, shapes, dtypes and norms; of two, what differs")
    inspect.add_argument("a", metavar="A", help=place)
    inspect.add_argument("b", metavar="B", nargs="?", help="a second one, to compare")
    inspect.add_argument("--norms", action="store_true", help="of a model on the Hub too: downloads its weights")
    inspect.set_defaults(run=_inspect)

    diff = commands.add_parser("diff", help="write the task vector from a base to a tuned model")
    diff.add_argument("base", metavar="BASE", help=place)
    diff.add_argument("tuned", metavar="TUNED", help=place)
    diff.add_argument("-o", "--output", required=True, help="a .safetensors file, or a folder")
    diff.add_argument("--include", action="append", metavar="PATTERN", help="names to take; may be repeated")
    diff.add_argument("--exclude", action="append", metavar="PATTERN", help="names to leave out; may be repeated")
    diff.add_argument("--overwrite", action="store_true", help="replace what is there")
    diff.set_defaults(run=_diff)
    return parser


def _diff(given: argparse.Namespace) -> None:
    base, tuned = load(given.base), load(given.tuned)
    vector = TaskVector.between(base, tuned, include=given.include, exclude=given.exclude)
    save(vector, given.output, overwrite=given.overwrite)
    print(f"{given.output}: {vector!r}")


def _inspect(given: argparse.Namespace) -> None:
    sides = [(label, load(label)) for label in (given.a, given.b) if label is not None]
    norms = given.norms or not any(isinstance(source_of(side), Remote) for _, side in sides)
    if given.b is None:
        _print_table(("name", "shape", "dtype", "norm"), _rows(sides[0][1], norms=norms))
    else:
        _print_table(("name", given.a, given.b, "difference"), _compared(sides[0][1], sides[1][1], norms=norms))
    for label, side in sides:
        specs = source_of(side).specs.values()
        print(f"{label}: {len(specs)} tensors, {sum(spec.entries for spec in specs):,} entries")
    if not norms:
        print("norms were left out, since they need the weights; --norms downloads them")


def _rows(model: Mapping[str, Tensor], *, norms: bool) -> Iterator[tuple[str, ...]]:
    source = source_of(model)
    for name, spec in source.specs.items():
        yield name, _shape(spec), _dtype(spec), _norm(source, name) if norms else ""


def _compared(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, norms: bool) -> Iterator[tuple[str, ...]]:
    """A row for each tensor that differs: in being there, in shape, in dtype or in its values."""
    left, right = source_of(a).specs, source_of(b).specs
    for name in dict.fromkeys([*left, *right]):
        ours, theirs = left.get(name), right.get(name)
        texts = tuple("-" if spec is None else f"{_shape(spec)} {_dtype(spec)}" for spec in (ours, theirs))
        if ours is None or theirs is None:
            yield name, *texts, "only in one"
        elif ours.shape != theirs.shape:
            yield name, *texts, "shape"
        elif norms and _has_norm(ours) and _has_norm(theirs):
            norm = _norm(TaskVector.between({name: a[name]}, {name: b[name]}, include=[name]).source, name)
            if ours.dtype != theirs.dtype or norm != "0":
                yield name, *texts, f"norm {norm}"
        elif ours.dtype != theirs.dtype:
            yield name, *texts, "dtype"
        elif norms and not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a[name], b[name]))):
            yield name, *texts, "values"


def _has_norm(spec: Spec) -> bool:
    """Whether differences are taken of such a tensor: not of integers, and not of float8."""
    return spec.dtype.is_floating_point and spec.dtype.itemsize > 1


def _norm(source: Source, name: str) -> str:
    if not _has_norm(source.specs[name]):
        return ""
    try:
        return f"{sqrt(measure([source], [name], squares)):.4g}"
    except ValueError:
        return "not finite"


def _shape(spec: Spec) -> str:
    return "x".join(map(str, spec.shape)) or "scalar"


def _dtype(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _print_table(titles: Sequence[str], rows: Iterator[tuple[str, ...]]) -> None:
    lines = [tuple(titles), *rows]
    if len(lines) == 1:
        print("no differences")
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
