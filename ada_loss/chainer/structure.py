"""Variables inside nested tuples, lists and dictionaries: taken out, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import chainer


@dataclass(frozen=True)
class _Place:
    index: int


def flatten(nested: Any) -> tuple[list[chainer.Variable], Any]:
    """The variables in a nested structure, in order, and the structure with their places; `rebuild` undoes it."""
    variables: list[chainer.Variable] = []

    def visit(value: Any) -> Any:
        if isinstance(value, chainer.Variable):
            variables.append(value)
            return _Place(len(variables) - 1)
        return _map(visit, value)

    return variables, visit(nested)


def rebuild(layout: Any, variables: Sequence[Any]) -> Any:
    """The structure with its places filled by `variables`, in order."""

    def visit(value: Any) -> Any:
        return variables[value.index] if isinstance(value, _Place) else _map(visit, value)

    return visit(layout)


def _map(visit: Any, value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(visit, value))
    if type(value) in (tuple, list):
        return type(value)(map(visit, value))
    if isinstance(value, dict):
        return type(value)((key, visit(item)) for key, item in value.items())
    return value
