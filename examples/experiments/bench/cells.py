"""Results: one append-only file of JSON lines for each table, every line under a key of what it was made from.

A key is a hash of settings and of code: a row whose strengths, images or functions differ from those that made it is
not found, and is measured again. Lines are never changed: a run may be stopped at any time, and several processes may
write to one file.
"""

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .cache import Json

FOLDER = Path(__file__).parents[1] / "results"
OURS = ("bench.", "taskvec.attacks", "taskvec.defenses")  # whose functions count as code that makes a row


def key(settings: Mapping[str, Json]) -> str:
    """A hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def read(path: Path) -> dict[str, Any]:
    """Key -> value; of lines with one key the last one counts."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {kept["key"]: kept["value"] for kept in map(json.loads, lines)}


def append(path: Path, under: str, label: Sequence[str | int], value: Json) -> None:
    """Add a line, whole or not at all: its key, what a person calls it, and its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": under, "label": label, "value": value}, separators=(",", ":"))
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())  # one write at the end of the file: lines of several processes do not mix


# --- the code that makes a row ---------------------------------------------------------------------------------------


def code_of(function: Callable[..., Any]) -> str:
    """A hash of a function and of all functions of the experiments, attacks and defenses that it calls.

    Neither comments, docstrings, annotations nor the words of errors count; the arguments of a partial do.
    """
    found: dict[str, str] = {}
    _gather(function, found)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _gather(value: Any, found: dict[str, str]) -> None:
    while isinstance(value, partial):
        arguments = [*value.args, *value.keywords.values()]
        told = [getattr(x, "__qualname__", type(x).__name__) if callable(x) else repr(x) for x in arguments]
        found[f"partial of {value.func.__qualname__}"] = repr([*told, *value.keywords])
        for argument in arguments:
            _gather(argument, found)
        value = value.func
    value = getattr(value, "__wrapped__", value)  # a cached function
    name = isinstance(value, FunctionType) and _name(value)
    if name and name not in found:
        found[name] = _bare(value)
        for inner in _called(value):
            _gather(inner, found)


def _name(function: FunctionType) -> str:
    """The name of a function whose code makes a row; a script's is the same whether it is run or imported."""
    file = Path(function.__code__.co_filename)
    script = file.parent == FOLDER.parent and not function.__module__.startswith("mine ")
    name = f"{file.stem if script else function.__module__}.{function.__qualname__}"
    return name if script or name.startswith((*OURS, "mine ")) else ""


@cache
def _bare(function: FunctionType) -> str:
    """The source of a function without what does not change its results."""
    if function.__name__ == "<lambda>":  # the lines of one are not a statement
        return repr((function.__code__.co_code.hex(), function.__code__.co_names, function.__code__.co_consts))
    return ast.dump(_Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(function)))))


class _Bare(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns, node.decorator_list = None, []
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.Pass:
        return ast.copy_location(ast.Pass(), node)

    def _without_docstring(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def _called(function: FunctionType) -> list[Any]:
    """What the names in a function's code stand for: functions, and functions of modules."""
    names = {*function.__code__.co_names}
    for constant in function.__code__.co_consts:
        names |= {*getattr(constant, "co_names", ())}
    values = [function.__globals__[name] for name in sorted(names) if name in function.__globals__]
    for cell in function.__closure__ or ():
        values += cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
    modules = [value for value in values if isinstance(value, ModuleType)]
    return values + [getattr(module, name) for module in modules for name in sorted(names) if hasattr(module, name)]
