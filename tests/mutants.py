"""`make mutants`: change the library in one place at a time, and see whether a test notices.

mutmut makes the mutants and runs, for each, the tests that reach the changed function. Two things are set here: rules
carry the decorator `runs`, which mutmut would leave out; and texts, `raise` statements, casts of the type checker and
zip's `strict=` are left as they are, for no test of what the library computes could tell. All work is done on a copy in
build/mutants; survivors are written there as diffs. tests/mutants.md tells why they survive.

    make mutants                      a random sample, in less than an hour on two cores
    make mutants ARGS="--all"         every mutant
    make mutants ARGS="--only 'taskvec.merges._ties.*'"
"""

import argparse
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from mutmut import __main__ as mutmut
from mutmut.mutation import file_mutation, mutators
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.state import state
from mutmut.stats import status_by_exit_code

WORKPLACE = Path("build/mutants")
COPIED = ("src", "tests", "docs", "examples", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SECONDS = 5  # of tests for one mutant, the quickest ones; what survives them counts as a survivor
KILLED = {"killed", "timeout", "segfault"}
collect = mutmut.collect_or_load_stats


class Visitor(file_mutation.MutationVisitor):
    """What is mutated: functions marked by `runs` too, and neither `raise` statements, casts nor `strict=`."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and len(node.decorators) == 1:
            decorator = node.decorators[0].decorator
            if isinstance(decorator, cst.Call) and getattr(decorator.func, "value", "") == "runs":
                return False
        idle = m.Raise() | m.Call(m.Name("cast")) | m.Arg(keyword=m.Name("strict"))
        return m.matches(node, idle) or super()._skip_node_and_children(node)

    def _should_mutate_node(self, node: cst.CSTNode) -> bool:
        return not m.matches(node, m.Call(m.Name("zip"))) and super()._should_mutate_node(node)


def copy_the_tree() -> None:
    """Copy what the tests need, and go there: mutmut works in the current folder."""
    shutil.rmtree(WORKPLACE, ignore_errors=True)
    WORKPLACE.mkdir(parents=True)
    for name in COPIED:
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, WORKPLACE / name)
    os.chdir(WORKPLACE)


def mutants() -> dict[str, int | None]:
    """Every mutant by name, and how its tests ended: None before they ran."""
    found, _ = mutmut.collect_source_file_mutation_data(mutant_names=[])
    return {name: code for _, name, code in found}


def quickest(tests: Iterable[str]) -> set[str]:
    """The quickest tests, so many as fit."""
    took = state().duration_by_test
    whole, chosen = 0.0, set[str]()
    for test in sorted(tests, key=lambda name: took[name]):
        whole += took[test]
        if chosen and whole > SECONDS:
            break
        chosen.add(test)
    return chosen


def collected_with_limit(*args: object, **kwargs: object) -> None:
    """Which tests reach which function, as mutmut finds it, without the slowest."""
    collect(*args, **kwargs)
    reached = state().tests_by_mangled_function_name
    for function, tests in reached.items():
        reached[function] = quickest(tests)


def make_mutants() -> None:
    mutmut.collect_or_load_stats = collected_with_limit
    file_mutation.MutationVisitor = Visitor
    file_mutation.mutation_operators[:] = [
        (kind, operator)
        for kind, operator in file_mutation.mutation_operators
        if operator is not mutators.operator_string
    ]
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(1)


def report(results: Iterable[tuple[str, str]]) -> None:
    """Print a line for each room and one for all; a mutant whose tests never end, or end the process, is killed."""
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in results:
        for room in (name.split(".")[1], "all"):
            rooms[room]["killed" if status in KILLED else status] += 1
    print(f"{'room':<14}{'mutants':>9}{'killed':>9}{'survived':>10}{'no tests':>10}{'share, %':>10}")
    for room, counts in sorted(rooms.items(), key=lambda item: (item[0] == "all", item[0])):
        tried, killed = counts.total(), counts["killed"]
        left = f"{counts['survived']:>10}{counts['no tests']:>10}"
        print(f"{room:<14}{tried:>9}{killed:>9}{left}{100 * killed / tried:>10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=1000, help="how many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="mutants with such a name")
    given = parser.parse_args()
    copy_the_tree()
    make_mutants()
    names = sorted(name for name in mutants() if fnmatch(name, given.only))
    chosen = names if given.all else random.Random(given.seed).sample(names, min(given.sample, len(names)))
    print(f"{len(chosen)} of {len(names)} mutants")
    mutmut._run(chosen, os.cpu_count())
    found = mutants()
    results = [(name, status_by_exit_code[found[name]]) for name in sorted(chosen)]
    survivors = [name for name, status in results if status not in KILLED]
    Path("survivors.diff").write_text("\n".join(f"# {name}\n{get_diff_for_mutant(name)}" for name in survivors))
    report(results)
    print(f"survivors: {WORKPLACE / 'survivors.diff'}")


if __name__ == "__main__":
    main()
