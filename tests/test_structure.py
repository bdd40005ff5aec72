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

# Floors from the ground up: a floor imports only floors above it, and a file of a floor only those before it.
FLOORS = [
    [
        "errors",
        *("_engine.random", "_engine.names", "_engine.transfers", "_engine.sources", "_engine.pieces"),
        *(
            "_engine.pools",
            "_engine.totals",
            "_engine.marks",
            "_engine.select",
            "_engine.ranks",
            "_engine.survivors",
            "_engine.buffers",
            "_engine.run",
            "_engine.lazy",
            "_engine.lift",
            "_engine.memory",
        ),
        "_answers",
    ],
    [
        *("rules", "sparsify", "signs"),
        *("_vectors.model", "_vectors.arithmetic", "_vectors.fingerprint", "_vectors.show"),
        *(
            "_vectors.measures",
            "_vectors.vector",
            "_vectors.rounding",
            "_vectors.backdoor",
            "_vectors.merge",
            "_vectors.checks",
        ),
    ],
    [
        *("merges._sums", "merges._ties", "merges._masks", "merges._choice", "merges._sphere", "merges._regmean"),
        *("merges._localized", "merges._balance"),
        *("merges._matrices", "merges._lowrank", "merges._shared_basis", "merges._solved"),
        "merges",
        *("_files.format", "_files.paths", "_files.safetensors", "_files.precheck", "_files.pickles"),
        *("_files.adapters", "_files.hub", "_files.load"),
        *(
            "_files.provenance",
            "_files.cards",
            "_files.layout",
            "_files.partial",
            "_files.progress",
            "_files.save",
            "_files.save_adapter",
        ),
        *("metrics._similarity", "metrics._intervals", "metrics._rates", "metrics._measure", "metrics"),
        *("calibration._grams", "calibration._adamerging", "calibration._surgery", "calibration._batchnorm"),
        "calibration",
        "testing",
    ],
    [
        *("presets", "per_task", "schedules", "rebase"),
        *("attacks.triggers._patch", "attacks.triggers._whole", "attacks.triggers._text", "attacks.triggers"),
        *(
            "attacks._sparse",
            "attacks._poison",
            "attacks._patches",
            "attacks._badmerging",
            "attacks._offtask",
            "attacks",
        ),
        *("defenses._strength", "defenses._twins", "defenses._screening", "defenses._contributors", "defenses._base"),
        *(
            "defenses._models",
            "defenses._probes",
            "defenses._bank",
            "defenses._prototypes",
            "defenses._texts",
            "defenses",
        ),
        *("plot", "__main__"),
    ],
]
ORDER = [file for floor in FLOORS for file in floor]
ROOMS = {file.split(".")[0] for file in ORDER}
FORBIDDEN = {
    "merges": {"_vectors", "_files"},  # rules have never heard of vectors
    "_files": {"merges", "metrics", "calibration"},
    "attacks": {"defenses"},  # an attack knows no defense, and a defense is given its probes
    "defenses": {"attacks"},
}
FILE_ROOM = "_files"


def file_of(path: Path) -> str:
    """`merges._ties` for merges/_ties.py, `merges` for merges/__init__.py."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(path: Path) -> str:
    return file_of(path).split(".")[0]


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """The files of ours that a module of a package imports, each as `merges._ties`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "taskvec"):
            parts = (node.module or "").split(".") if node.module else []
            base = package[: len(package) - node.level + 1] + parts if node.level else parts[1:]
            for alias in node.names:
                yield from [name for name in (".".join([*base, alias.name]), ".".join(base)) if name in ORDER][:1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("taskvec.") for alias in node.names if alias.name.startswith("taskvec.")
            )


def wrong_imports(file: str, tree: ast.AST, package: list[str] | None = None) -> list[str]:
    """The imports that a file may not have: of a file after it, or of a room that its own must not know."""
    if file not in ORDER:
        return []
    package = file.split(".")[:-1] if package is None else package
    found = set(imported(tree, package))
    late = {other for other in found if other not in ORDER[: ORDER.index(file)]}
    return sorted(
        late | {other for other in found if other.split(".")[0] in FORBIDDEN.get(file.split(".", maxsplit=1)[0], set())}
    )


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def of_files(*skipped: str) -> pytest.MarkDecorator:
    """Every source file but those in some rooms, or of some names."""
    files = [path for path in FILES if not {room_of(path), file_of(path)} & set(skipped)]
    return pytest.mark.parametrize("path", files, ids=lambda path: path.relative_to(SOURCE).as_posix())


def test_every_file_is_on_a_floor():
    files = {file_of(path) for path in FILES} - {"__init__", "_engine", "_vectors", "_files"}
    assert files == set(ORDER)
    assert len(ORDER) == len(set(ORDER))
    assert len(ROOMS) <= 20


@of_files()
def test_a_file_imports_only_what_is_before_it(path):
    file = file_of(path)
    package = file.split(".") if path.name == "__init__.py" else file.split(".")[:-1]
    assert wrong_imports(file, parsed(path), package) == []


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("_engine.random", "from .sources import Source", ["_engine.sources"]),
        ("sparsify", "from .signs import elect", ["signs"]),
        ("_engine.lift", "from .. import merges", ["merges"]),
        ("_engine.lift", "from ..merges import ties", ["merges"]),
        ("_vectors.vector", "from taskvec._vectors.merge import merge", ["_vectors.merge"]),
        ("_vectors.vector", "import taskvec.merges", ["merges"]),
        ("_vectors.merge", "def f():\n    from .._files.load import load", ["_files.load"]),
        ("_files.load", "from ..metrics import cosine_matrix", ["metrics"]),
        ("rules", "from .testing import check_rule", ["testing"]),
        ("merges._ties", "from .._vectors.vector import TaskVector", ["_vectors.vector"]),
        ("attacks._poison", "from ..defenses import shrink", ["defenses"]),
        ("attacks.triggers._patch", "from ...defenses._base import shrink", ["defenses._base"]),
        ("defenses._bank", "from taskvec import attacks", ["attacks"]),
    ],
)
def test_a_wrong_import_would_be_seen(file, line, found):
    assert wrong_imports(file, ast.parse(line)) == found


def test_a_right_import_is_not_seen():
    assert (
        wrong_imports("attacks._poison", ast.parse("from .._engine.random import fold\nfrom ..errors import X")) == []
    )


# devices, files, output


def calls(tree: ast.AST, names: set[str]) -> list[str]:
    """Calls of methods or functions of these names."""
    nodes = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in nodes]
    return sorted({name for name in found if name in names})


@of_files("_engine.select", "_engine.ranks", "_engine.random", "_engine.survivors", FILE_ROOM)
def test_nothing_moves_between_devices_on_the_sly(path):
    assert calls(parsed(path), {"cpu", "cuda", "numpy"}) == []


@of_files(FILE_ROOM)
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
    assert len(path.read_text("utf-8").splitlines()) <= 560
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
    """Every module without an underscore in its path: the package itself left out."""
    files = sorted({file_of(path) for path in FILES} - {"__init__"})
    return [file for file in files if not any(part.startswith("_") for part in file.split("."))]


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


FACE = {"HERE", "Look", "Mark", "Place", "Scope", "fold", "lockstep", "mark_of", "masked", "over", "runs", "sum64"}
OFFERED = {
    *(
        "BackdoorVector",
        "TaskVector",
        "load",
        "merge",
        "peak_memory",
        "rename",
        "rounding_loss",
        "save",
        "save_adapter",
    ),
    "select",
}


def test_there_are_few_public_modules_and_each_public_name_has_one_path():
    assert len(public_modules()) <= 16
    paths: dict[str, list[str]] = {name: ["taskvec"] for name in OFFERED}
    for module in public_modules():
        for name in import_module(f"taskvec.{module}").__all__:
            paths.setdefault(name, []).append(module)
    assert {name: where for name, where in paths.items() if len(where) > 1} == {}
    assert set(import_module("taskvec.rules").__all__) == FACE


def test_the_package_itself_offers_a_few_names_and_public_modules():
    rooms = {name.split(".")[0] for name in public_modules()}
    assert set(taskvec.__all__) == OFFERED | (rooms - {"testing", "plot"})  # those need further libraries
    assert set(dir(taskvec)) >= set(taskvec.__all__)
    assert {name for name in dir(taskvec) if not name.startswith("_")} == set(taskvec.__all__)


@pytest.mark.parametrize("name", [name for name in public_modules() if name != "plot"])
def test_completion_shows_public_names_only(name):
    module = import_module(f"taskvec.{name}")
    assert [shown for shown in dir(module) if not shown.startswith("_")] == module.__all__


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
