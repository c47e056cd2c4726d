"""Variables inside nested tuples, lists and dictionaries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import chainer


def map_variables(change: Callable[[chainer.Variable], chainer.Variable], value: Any) -> Any:
    """A nested structure with every variable in it changed, the structure itself where none is.

    Looks into tuples, named tuples, lists and dictionaries; everything else stays as it is.
    """
    if isinstance(value, chainer.Variable):
        return change(value)
    if isinstance(value, dict):
        changed = [map_variables(change, item) for item in value.values()]
        if all(new is old for new, old in zip(changed, value.values(), strict=True)):
            return value
        # A copy keeps what subclasses hold besides, such as the factory of a defaultdict.
        new = copy.copy(value)
        new.update(zip(value, changed, strict=True))
        return new
    if type(value) in (tuple, list) or isinstance(value, tuple) and hasattr(value, "_fields"):
        changed = [map_variables(change, item) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value
