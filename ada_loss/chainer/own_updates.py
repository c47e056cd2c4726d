"""Optimizers with an `update` of their own: their step is taken where they call `super().update()`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import chainer

from ada_loss.chainer.user_functions import LIBRARIES

NO_STEP = (
    "{name}.update never calls super().update(), which takes the step with true gradients on float32 "
    "masters: call it there, and change parameters by hand only before or after."
)
NO_GRADIENT_METHOD = (
    "ada_loss.chainer.prepare takes an optimizer derived from chainer.GradientMethod, or one that holds such "
    "an optimizer; {name} is neither."
)


def optimizers_inside(optimizer: Any) -> list[Any]:
    """The optimizers that an optimizer holds and leaves the step to; none if it takes the step itself."""
    inside = [held for held in vars(optimizer).values() if _is_set_up(held)]
    if inside and not (isinstance(optimizer, chainer.GradientMethod) and _takes_steps(type(optimizer))):
        return inside
    return []


def require_step(optimizer: Any) -> None:
    """Make sure that an optimizer's update takes a step of Chainer's.

    Raises:
        TypeError: it is no gradient method.
        ValueError: it has an update of its own which never takes the step.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, chainer.GradientMethod):
        raise TypeError(NO_GRADIENT_METHOD.format(name=name))
    if not _takes_steps(type(optimizer)):
        raise ValueError(NO_STEP.format(name=name))


def _takes_steps(cls: type) -> bool:
    """Whether the update of an optimizer's class is Chainer's, or leads there as far as its code tells."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in (*LIBRARIES, "builtins")]
    if not any("update" in vars(base) for base in own):
        return True
    functions = (inspect.unwrap(f) for base in own for f in vars(base).values() if inspect.isfunction(f))
    return any({"super", "update"} <= set(_names(function.__code__)) for function in functions)


def _names(code: CodeType) -> Iterator[str]:
    """The names that code and functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_set_up(held: Any) -> bool:
    return isinstance(held, chainer.Optimizer) and held.target is not None
