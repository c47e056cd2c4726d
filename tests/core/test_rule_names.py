"""Nobody asks a rule for its name: what differs between rules is in the rules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ada_loss.core.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    path.relative_to(ROOT).as_posix()
    for folder in ("ada_loss", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def strings(node: ast.expr) -> set[object]:
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant)}


@pytest.mark.parametrize("path", CODE)
def test_no_name_of_a_rule_is_compared_with(path: str) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Compare):
            compared = set().union(*map(strings, [node.left, *node.comparators]))
            # `auto` is also a choice of kernels, devices, communicators and checkpoints.
            found = compared & (RULES.keys() - {"auto"})
            if "auto" in compared and "method" in ast.unparse(node):
                found.add("auto")
            assert not found, ast.unparse(node)
