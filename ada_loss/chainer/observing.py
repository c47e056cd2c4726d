"""Observers of backward passes: whom the engine tells what comes out of each function. There is usually none.

The engine calls, and does not know, whoever observes; `recording` has the observers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from ada_loss.chainer.gradient import ScaledGradient


class Observer(Protocol):
    """Somebody who is told of backward passes; `outputs` are pairs of nodes and gradients or None."""

    def before_pass(self, outputs: list[tuple[Any, Any]], loss_scale: float, *, ours: bool) -> None:
        """A pass is about to begin, by this package's engine if `ours`, by Chainer's otherwise."""

    def look(self, function: Any, exponent: int, found: Iterable[tuple[Any, ScaledGradient]]) -> None:
        """The backward of a function, whose output gradients carried `exponent`, has given gradients."""


_observers: list[Observer] = []


def add(observer: Observer) -> None:
    """Tell an observer from now on."""
    if observer not in _observers:
        _observers.append(observer)


def remove(observer: Observer) -> None:
    """Tell an observer no more."""
    if observer in _observers:
        _observers.remove(observer)


def before_pass(outputs: list[tuple[Any, Any]], loss_scale: float | None, *, ours: bool) -> None:
    """Tell all observers that a pass is about to begin."""
    for observer in tuple(_observers):
        observer.before_pass(outputs, loss_scale or 1.0, ours=ours)


def look(function: Any, exponent: int, found: Iterable[tuple[Any, ScaledGradient]]) -> None:
    """Tell all observers what came out of a function."""
    for observer in _observers:
        observer.look(function, exponent, found)
