"""Variables inside what a model returns: in containers, distributions and other plain objects."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import chainer
import numpy as np

_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    np.ndarray,
    np.generic,
    np.dtype,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.GeneratorType,
    chainer.Link,
    chainer.FunctionNode,
    chainer.variable.VariableNode,
    chainer.backend.Device,
)
"""What is not looked into: it holds no results, or is no result itself."""


Change = Callable[[Any], Any]


def map_variables(change: Change, value: Any) -> Any:
    """A nested structure with its variables changed; the very object where `change` returns what it is given.

    What holds something that changes is copied. Arrays are changed only in distributions, whose parameters
    they may be.
    """
    return _mapped(change, value, False, {})


def _mapped(change: Change, value: Any, arrays: bool, made: dict[int, Any]) -> Any:
    if isinstance(value, chainer.Variable) or arrays and isinstance(value, chainer.get_array_types()):
        new = change
    elif value is None or isinstance(value, _LEAVES):
        return value
    else:
        new = partial(_copied, change, arrays=arrays or isinstance(value, chainer.Distribution), made=made)
    if id(value) not in made:
        # The value is kept, so that no other one gets its id. What refers back to it finds it as it is.
        made[id(value)] = value, value
        made[id(value)] = value, new(value)
    return made[id(value)][1]


def _copied(change: Change, value: Any, arrays: bool, made: dict[int, Any]) -> Any:
    """A container or object with what it holds changed; itself where nothing in it changes."""
    items = dict(enumerate(value)) if isinstance(value, tuple | list | deque) else {}
    items = dict(value) if isinstance(value, dict) else items
    attributes = _attributes(value)
    new_items = _changes(change, items, arrays, made)
    new_attributes = _changes(change, attributes, arrays, made)
    if not new_items and not new_attributes:
        return value
    new: Any
    if isinstance(value, tuple):
        all_items = (items | new_items).values()
        new = type(value)(*all_items) if hasattr(value, "_fields") else type(value)(all_items)
    else:
        # A copy keeps what subclasses hold besides, such as the factory of a defaultdict.
        new = copy.copy(value)
        for key, item in new_items.items():
            new[key] = item
    for name, item in new_attributes.items():
        object.__setattr__(new, name, item)
    return new


def _changes(change: Change, held: dict[Any, Any], arrays: bool, made: dict[int, Any]) -> dict[Any, Any]:
    """Those of several values that change, as they are then."""
    changed = {key: _mapped(change, value, arrays, made) for key, value in held.items()}
    return {key: value for key, value in changed.items() if value is not held[key]}


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, in its dictionary and in slots."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found
