"""Who imports whom: the map in docs/design.md holds, and nobody imports in circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {
    "ada_loss": {"ada_loss.core", "ada_loss.report", "ada_loss.chainer", "ada_loss.torch"},
    "ada_loss.install": set(),
    "ada_loss.core": {"numpy"},
    "ada_loss.arrays": {"ada_loss.core", "numpy", "cupy", "torch"},
    "ada_loss.report": {"ada_loss.core", "numpy", "altair", "jinja2", "markupsafe", "vl_convert", "PIL"},
    "ada_loss.chainer": {
        "ada_loss.core",
        "ada_loss.arrays",
        "numpy",
        "chainer",
        "chainermn",
        "cupy",
        "mpi4py",
        "torch",
    },
    "ada_loss.torch": {"ada_loss.core", "ada_loss.arrays", "numpy", "torch"},
}
"""What each part of the package may import, besides itself and the standard library."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in (ROOT / "ada_loss").rglob("*.py")}


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """A module's nodes, but for imports that only tell types."""
    for child in ast.iter_child_nodes(tree):
        if (
            isinstance(child, ast.If)
            and isinstance(child.test, ast.Name)
            and child.test.id == "TYPE_CHECKING"
        ):
            continue
        yield child
        yield from nodes_at_run_time(child)


def imported(name: str) -> Iterator[str]:
    """The modules that one imports, anywhere in it, in full."""
    for node in nodes_at_run_time(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def room_of(name: str) -> str:
    return max((room for room in ROOMS if name == room or name.startswith(f"{room}.")), key=len)


def outside(name: str) -> str:
    """What a module belongs to: a part of this package, or a package of its own."""
    return room_of(name) if name.partition(".")[0] == "ada_loss" else name.partition(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_nothing_against_the_map(name: str) -> None:
    allowed = ROOMS[room_of(name)] | {room_of(name)} | sys.stdlib_module_names
    assert {each: outside(each) for each in imported(name) if outside(each) not in allowed} == {}


def test_nobody_imports_in_circles() -> None:
    graph = {
        # A package is there before its modules.
        name: {each for each in imported(name) if each in MODULES and not name.startswith(f"{each}.")}
        for name in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_map_in_the_design_says_the_same() -> None:
    rows = [line for line in (ROOT / "docs" / "design.md").read_text().splitlines() if "| `ada_loss" in line]
    written = {}
    for row in rows:
        room, _, may = (cell.strip() for cell in row.strip("| ").split(" | "))
        written[room.strip("`")] = set(may.replace("`", "").split(", ")) - {"nothing"}
    assert written == ROOMS
