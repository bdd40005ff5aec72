"""What the code as a whole must look like: who imports whom, what is public, what an import brings in."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import taskvec

ROOT = Path(__file__).parent.parent
SOURCE = Path(taskvec.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Rooms from the ground up; each may import those above it in this list.
ORDER = [
    *("_types", "_errors", "_modes", "_random", "_lazy", "rules", "_select"),
    *("sparsify", "signs"),
    *("merges", "sphere", "lowrank"),
    *("_fingerprint", "_engine"),
    *("_model", "_arithmetic", "_display", "vector", "backdoor", "merging"),
    *("similarity", "modulate"),
    *("_format", "checkpoint", "adapters", "writer"),
    *("statistics", "adaptive", "intervals", "evaluate", "presets"),
    *("attacks", "defenses"),
    *("plot", "testing", "__main__", "__init__"),
]
TENSOR_ROOMS = {"_select", "sparsify", "signs", "merges", "sphere", "lowrank"}
FILE_ROOMS = {"_format", "checkpoint", "adapters", "writer"}
FORBIDDEN = {
    "_engine": TENSOR_ROOMS,  # it has never heard of a particular rule
    "_fingerprint": TENSOR_ROOMS,
    **{room: {"similarity", "modulate"} for room in FILE_ROOMS},
    "attacks": {"defenses"},  # an attack knows no defence and a defence is given its probes
    "defenses": {"attacks"},
}
ANYTHING = {"plot", "testing", "__main__", "__init__"}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST, depth: int) -> Iterator[str]:
    """The rooms of ours that a module imports; depth counts the folders it lies in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:  # from . import a; from .a import b
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "taskvec":
            parts = (node.module or "").split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("taskvec."))


def wrong_imports(room: str, tree: ast.AST, depth: int = 0) -> list[str]:
    """The imports a room may not have."""
    if room in ANYTHING:
        return []
    allowed = set(ORDER[: ORDER.index(room)]) - FORBIDDEN.get(room, set()) - ANYTHING
    return sorted({other for other in imported_rooms(tree, depth) if other not in allowed | {room}})


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def of_files(*skipped: str) -> pytest.MarkDecorator:
    """Every source file but those in some rooms."""
    files = [path for path in FILES if room_of(path) not in skipped]
    return pytest.mark.parametrize("path", files, ids=lambda path: path.relative_to(SOURCE).as_posix())


@of_files()
def test_a_module_imports_only_what_is_below_it(path):
    depth = len(path.relative_to(SOURCE).parts) - 1
    assert wrong_imports(room_of(path), parsed(path), depth) == []


@pytest.mark.parametrize(
    ("room", "line", "found"),
    [
        ("_random", "from ._lazy import Lazy", ["_lazy"]),
        ("sparsify", "from .signs import elect", ["signs"]),
        ("_engine", "from . import merges", ["merges"]),
        ("_engine", "from ._select import kept", ["_select"]),
        ("vector", "from taskvec.merging import merge", ["merging"]),
        ("vector", "import taskvec.merging", ["merging"]),
        ("merging", "def f():\n    from .checkpoint import load", ["checkpoint"]),
        ("checkpoint", "from .similarity import cosine_matrix", ["similarity"]),
        ("rules", "from .testing import check_rule", ["testing"]),
        ("evaluate", "from taskvec import merge, attacks", ["attacks", "merge"]),
    ],
)
def test_a_wrong_import_would_be_seen(room, line, found):
    assert wrong_imports(room, ast.parse(line)) == found


@pytest.mark.parametrize(("room", "other"), [("attacks", "defenses"), ("defenses", "attacks")])
def test_attacks_and_defences_importing_each_other_would_be_seen(room, other):
    for line in (f"from ..{other}.sub import f", f"from .. import {other}", f"import taskvec.{other}.sub"):
        assert wrong_imports(room, ast.parse(line), depth=1) == [other]
    assert wrong_imports(room, ast.parse("from ..vector import TaskVector"), depth=1) == []
    assert wrong_imports(room, ast.parse("from .vector import f"), depth=1) == []  # a neighbour of that name


# devices, files, output


def calls(tree: ast.AST, names: set[str]) -> list[str]:
    """Calls of methods or functions of these names."""
    nodes = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in nodes]
    return sorted({name for name in found if name in names})


@of_files("_select", *FILE_ROOMS)
def test_nothing_moves_between_devices_on_the_sly(path):
    assert calls(parsed(path), {"cpu", "cuda", "numpy"}) == []


@of_files(*FILE_ROOMS, "plot", "__main__")
def test_only_the_file_rooms_touch_files(path):
    assert calls(parsed(path), {"open", "safe_open", "read_bytes", "read_text", "write_bytes", "write_text"}) == []
    assert "safetensors" not in {alias.name.split(".")[0] for alias in imports(parsed(path))}


def imports(tree: ast.AST) -> list[ast.alias]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [ast.alias(node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    return modules + [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]


@of_files("__main__")
def test_nothing_prints(path):
    assert calls(parsed(path), {"print"}) == []


@of_files()
def test_nothing_sets_a_seed_or_a_default_for_everybody(path):
    everybody = {"manual_seed_all", "seed_all", "set_default_device", "set_default_dtype", "set_grad_enabled"}
    everybody |= {"set_flush_denormal", "set_rng_state"}
    assert calls(parsed(path), everybody) == []
    assert "torch.manual_seed(" not in path.read_text("utf-8")


def test_a_forbidden_call_would_be_seen():
    tree = ast.parse("x.cpu()\nprint(x)\nopen('a').read()\nx.cpu\nprinted(x)\nimport safetensors.torch\n")
    assert calls(tree, {"cpu", "print", "open", "cuda"}) == ["cpu", "open", "print"]
    assert [alias.name for alias in imports(tree)] == ["safetensors.torch"]


# size


@of_files()
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500
    assert code_lines(path.read_text("utf-8")) <= 300


def code_lines(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    strings = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    documented = {
        line
        for node in strings
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in documented for i, line in lines)


def test_lines_of_code_are_those_that_do_something():
    assert (
        code_lines('"""Two\nlines."""\n\n# a comment\nx = 1  # here\n\n\ndef f():\n    """One."""\n    return "x"\n')
        == 3
    )


# what is public


def public_modules() -> list[str]:
    """Every module without an underscore in its path; packages only gather what their modules offer."""
    paths = [path.relative_to(SOURCE).with_suffix("").parts for path in FILES]
    return [".".join(parts) for parts in paths if not any(part.startswith("_") for part in parts)]


@pytest.mark.parametrize("name", public_modules())
def test_all_names_what_is_public_sorted_and_documented(name):
    module = import_module(f"taskvec.{name}")
    names: list[str] = module.__all__
    assert names == sorted(set(names))
    for public in names:
        assert not public.startswith("_")
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("taskvec.")
            assert inspect.getdoc(value)


OFFERED = {"BackdoorVector", "TaskVector", "TaskvecError", "load", "merge", "rounding_loss", "save"}


def test_the_package_itself_offers_a_few_names_and_public_modules():
    gathered = [node for node in parsed(SOURCE / "__init__.py").body if isinstance(node, ast.ImportFrom)]
    chosen = {alias.asname for node in gathered for alias in node.names}  # "a as a": on purpose
    rooms = {name.split(".")[0] for name in public_modules()}
    assert chosen - rooms == OFFERED
    assert {name for name in vars(taskvec) if not name.startswith("_")} - rooms == OFFERED


# what an import brings in

ALLOWED = "import torch, safetensors, safetensors.torch, numpy, typing_extensions"


def third_party(code: str) -> set[str]:
    """The top-level modules, not of Python itself, that a fresh interpreter has after some code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    return {name for name in done.stdout.split() if name not in sys.stdlib_module_names}


def test_importing_taskvec_brings_in_torch_safetensors_numpy_typing_extensions_and_nothing_else():
    extra = third_party("import taskvec") - third_party(ALLOWED)
    assert {name for name in extra if not name.startswith("_")} == {"taskvec"}


def test_a_further_import_would_be_seen():
    assert "pytest" in third_party("import pytest") - third_party("import json")


# versions


def test_changelog_and_citation_tell_the_version():
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == taskvec.__version__
    assert cited is not None
    assert cited[1] == taskvec.__version__
