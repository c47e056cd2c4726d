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


def map_variables(change: Change, value: Any, *, objects: bool = True) -> Any:
    """A nested structure with its variables changed; the very object where `change` returns what it is given.

    What holds something that changes is copied. Arrays are changed only in distributions, whose parameters
    they may be. objects: whether other objects than tuples, lists and dictionaries are looked into.
    """
    return _Mapping(change, objects).of(value)


class _Mapping:
    """One walk through a structure. made: what became of each object, by id."""

    def __init__(self, change: Change, objects: bool) -> None:
        self._change = change
        self._objects = objects
        self._made: dict[int, Any] = {}

    def of(self, value: Any, arrays: bool = False) -> Any:
        if isinstance(value, chainer.Variable) or arrays and isinstance(value, chainer.get_array_types()):
            new = self._change
        elif value is None or isinstance(value, _LEAVES):
            return value
        else:
            new = partial(self._copied, arrays=arrays or isinstance(value, chainer.Distribution))
        if id(value) not in self._made:
            # The value is kept, so that no other one gets its id. What refers back to it finds it as it is.
            self._made[id(value)] = value, value
            self._made[id(value)] = value, new(value)
        return self._made[id(value)][1]

    def _copied(self, value: Any, arrays: bool) -> Any:
        """A container or object with what it holds changed; itself where nothing in it changes."""
        items = self._changes(_items(value), arrays)
        attributes = self._changes(_attributes(value) if self._objects else {}, arrays)
        if not items and not attributes:
            return value
        new: Any
        if isinstance(value, tuple):
            new = tuple.__new__(type(value), (_items(value) | items).values())
            attributes = getattr(value, "__dict__", {}) | attributes
        else:
            # A copy keeps what subclasses hold besides, such as the factory of a defaultdict.
            new = copy.copy(value)
            for key, item in items.items():
                new[key] = item
        for name, item in attributes.items():
            if hasattr(new, "__dict__") and name in getattr(value, "__dict__", {}):
                # Not by way of the class, which may have a descriptor of that name.
                vars(new)[name] = item
            else:
                object.__setattr__(new, name, item)
        return new

    def _changes(self, held: dict[Any, Any], arrays: bool) -> dict[Any, Any]:
        """Those of several values that change, as they are then."""
        changed = {key: self.of(value, arrays) for key, value in held.items()}
        return {key: value for key, value in changed.items() if value is not held[key]}


def _items(value: Any) -> dict[Any, Any]:
    """What a container holds, by key or place."""
    if isinstance(value, dict):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, tuple | list | deque) else {}


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, in its dictionary and in slots."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found
