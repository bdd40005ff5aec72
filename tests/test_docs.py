"""The code in the README and the docs runs, and what the conventions page promises is tested."""

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = python_blocks(page.read_text("utf-8"))
    if page.name == "README.md":
        blocks = blocks[1:]  # the teaser: what follows repeats it with everything it needs
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


def test_a_block_that_fails_would_be_seen():
    with pytest.raises(ZeroDivisionError):
        exec(python_blocks("text\n```python\n1 / 0\n```\n")[0])


@cache
def known_tests() -> set[str]:
    trees = [ast.parse(path.read_text("utf-8")) for path in Path(__file__).parent.glob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_conventions_names_tests_that_exist():
    rows = [
        line for line in (ROOT / "docs" / "conventions.md").read_text("utf-8").splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 20
    for row in rows[2:]:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        assert set(named) <= known_tests(), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_picture_of_the_docs_is_shown():
    shown = "\n".join(page.read_text("utf-8") for page in PAGES)
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert picture.name in shown, picture.name


METHODS = (
    "merges",
    "sparsify",
    "signs",
    "presets",
    "attacks",
    "attacks.triggers",
    "defenses",
    "calibration",
    "metrics",
)
NO_METHODS = {"Adapter", "Estimate", "Flag", "Grams", "Measurement", "Pair", "Patch", "Rate", "Roc", "Screening"}
NO_METHODS |= {"Poisoned", "Substitution", "triggers"}


@pytest.mark.parametrize("module", METHODS)
def test_the_page_of_methods_lists_every_one(module):
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    names = set(import_module(f"taskvec.{module}").__all__) - NO_METHODS
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_fit_on_a_phone_in_landscape(page):
    lines = [line for block in python_blocks(page.read_text("utf-8")) for line in block.splitlines()]
    assert [line for line in lines if len(line) > 88] == []


PRIVATE = r"\b([Hh]e(?! et al)|[Hh]is|[Hh]im|nobody|globe|hand(s|ed)? in)\b"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_models_are_it_and_metaphors_are_not_ours(page):
    assert re.findall(PRIVATE, page.read_text("utf-8")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_so_they_are_in_the_source(path):
    assert re.findall(PRIVATE, path.read_text("utf-8")) == []
