"""Backward passes of Chainer's engine: whether one is running, and the loss scale that its gradients carry.

Chainer tells leaves their loss scale at the very end of a pass, and not at all in the pass that `F.forget`
starts inside another one. So the engine itself notes what it is called with.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any


class _Passes(threading.local):
    scale: float | None = None

    def __init__(self) -> None:
        self.entered: weakref.WeakSet[Any] = weakref.WeakSet()


_passes = _Passes()


def running() -> bool:
    """Whether `backward` is running in this thread (`chainer.grad` does not count)."""
    return _passes.scale is not None


def loss_scale() -> float:
    """The loss scale of the pass that is running, 1 where there is none."""
    return _passes.scale or 1.0


def note_entry(policy: Any) -> None:
    """Note that gradients have entered a scope with this policy's entry scale."""
    _passes.entered.add(policy)


def take_entered() -> set[Any]:
    """The policies noted in this thread since this was asked last."""
    entered = set(_passes.entered)
    _passes.entered.clear()
    return entered


def noting(engine: Callable[..., None]) -> Callable[..., None]:
    """A backward engine that notes what it is called with."""

    @functools.wraps(engine)
    def backprop(outputs: Any, retain_grad: bool, loss_scale: float | None) -> None:
        around = _passes.scale
        # A pass inside another one is the recomputation of a part of it: its gradients carry the same scale.
        _passes.scale = float(loss_scale or around or 1)
        try:
            engine(outputs, retain_grad, loss_scale)
        finally:
            _passes.scale = around

    return backprop
