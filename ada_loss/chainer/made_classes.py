"""Classes made on the fly: one of ours in front of an object's own, so that the object stays what it is.

Pickle and deepcopy find such a class by the two that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

_MADE: dict[tuple[type, type], type] = {}


def made_class(front: type, plain: type) -> type:
    """The class made of `front` and `plain`, in this order; always the same one.

    What `front` names in `MADE_MEMBERS` are members of the class itself.
    """
    if (front, plain) not in _MADE:
        name = plain.__name__ if plain.__name__.startswith("AdaLoss") else f"AdaLoss{plain.__name__}"
        members = getattr(front, "MADE_MEMBERS", {}) | {
            "__module__": plain.__module__,
            "__doc__": plain.__doc__,
            "_made_of": (front, plain),
        }
        _MADE[front, plain] = type(name, (front, plain), members)
    return _MADE[front, plain]


def plain_class(cls: type) -> type | None:
    """What a made class is made of besides ours; None for any other class."""
    made_of = cls.__dict__.get("_made_of")
    return None if made_of is None else made_of[1]


def become(thing: Any, cls: type) -> None:
    """Give an object another class, whatever its own does when attributes are set."""
    object.__setattr__(thing, "__class__", cls)


class _Reference(NamedTuple):
    """Stands for a made class in what is pickled."""

    front: type
    plain: type | _Reference


def picklable(make: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """How `__reduce_ex__` says make(*arguments) where made classes are among the arguments."""
    if not any(isinstance(argument, type) and plain_class(argument) for argument in arguments):
        return make, arguments
    return _make, (make, *map(_reference, arguments))


def _make(make: Callable[..., Any], *arguments: Any) -> Any:
    return make(*map(_resolved, arguments))


def _reference(argument: Any) -> Any:
    made_of = argument.__dict__.get("_made_of") if isinstance(argument, type) else None
    return argument if made_of is None else _Reference(made_of[0], _reference(made_of[1]))


def _resolved(argument: Any) -> Any:
    if isinstance(argument, _Reference):
        return made_class(argument.front, _resolved(argument.plain))
    return argument
