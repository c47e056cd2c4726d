"""Backward passes: whether one is running, the loss scale that its gradients carry, what user code sees.

Chainer tells leaves their loss scale at the very end of a pass, and not at all in the pass that `F.forget`
starts inside another one. So the engine itself notes what it is called with.

User code that runs inside a pass (a function's own backward, a hook) is handed gradients that may carry an
exponent. Whatever it starts, reads and writes meanwhile is taken to carry the same: see `carrying`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Changes:
    """What user code changes while it is handed gradients that carry `exponent`.

    hook: whether it is a hook and no function's backward. kept: whether what was there before is kept, so
    that changes can be undone. checked: whether the function
    that runs is checked to be linear, and those inside it need not be. parameters: each that was changed with
    what it held before, by id. leaves: variables that a pass inside gave a gradient, with the one before and
    that one, arrays or None, by id. communicates: whether a function inside has averaged over processes.
    """

    def __init__(
        self, exponent: int = 0, *, hook: bool = False, kept: bool = False, checked: bool = False
    ) -> None:
        self.exponent = exponent
        self.hook = hook
        self.kept = kept
        self.checked = checked
        self.parameters: dict[int, tuple[Any, Any]] = {}
        self.leaves: dict[int, tuple[weakref.ref[Any], Any, Any]] = {}
        self.communicates = False

    def keep(self, parameter: Any, held: Any) -> bool:
        """Keep what a parameter holds before its first change; whether that was done now."""
        if not self.kept or id(parameter) in self.parameters:
            return False
        self.parameters[id(parameter)] = parameter, held
        return True

    def give(self, leaf: Any, before: Any, array: Any) -> None:
        """Note that a leaf has been given an array as its gradient in place of the one before."""
        if self.kept or self.exponent:
            if self.gave(leaf):
                before = self.leaves[id(leaf)][1]
            self.leaves[id(leaf)] = weakref.ref(leaf), before, array

    def gave(self, leaf: Any) -> bool:
        """Whether a leaf's gradient is one that a pass inside gave it."""
        return id(leaf) in self.leaves and self.leaves[id(leaf)][0]() is leaf

    def add(self, inner: Changes) -> None:
        """Add what code has changed that ran inside this one."""
        for key, before in inner.parameters.items():
            self.parameters.setdefault(key, before)
        self.communicates |= inner.communicates


_NONE = Changes()
"""Outside of every pass gradients are true, and nothing is noted."""


class _Passes(threading.local):
    scale: float | None = None
    number = 0
    chainers = False
    changes = _NONE

    def __init__(self) -> None:
        self.entered: weakref.WeakSet[Any] = weakref.WeakSet()


_passes = _Passes()


def running() -> bool:
    """Whether a backward pass is running in this thread."""
    return _passes.scale is not None


def in_chainers_engine() -> bool:
    """Whether it is Chainer's own engine that runs, which takes and sets the gradients of leaves."""
    return _passes.chainers


def number() -> int:
    """How many passes have been begun in this thread; those inside another are a part of it."""
    return _passes.number


def loss_scale() -> float:
    """The loss scale of the pass that is running, 1 where there is none."""
    return _passes.scale or 1.0


def exponent() -> int:
    """The exponent of the gradients that user code is handed at the moment; 0 where they are true."""
    return _passes.changes.exponent


def in_users_backward() -> bool:
    """Whether backward of a user's function runs, and not a hook."""
    return _passes.changes is not _NONE and not _passes.changes.hook


def is_noted() -> bool:
    """Whether what passes change is of interest to the code that starts them inside another pass."""
    return _passes.changes.kept or _passes.changes.exponent != 0


def changes() -> Changes:
    """What the user code that is running inside a pass has changed so far."""
    return _passes.changes


@contextmanager
def carrying(
    exponent: int, *, hook: bool = False, kept: bool = False, checked: bool = False
) -> Iterator[Changes]:
    """Within it user code runs that is handed gradients which carry `exponent`; gives what it changes.

    hook, kept, checked: see `Changes`; the latter two are inherited by code inside.
    """
    around = _passes.changes
    mine = Changes(exponent, hook=hook, kept=kept or around.kept, checked=checked or around.checked)
    _passes.changes = mine
    try:
        yield mine
    finally:
        _passes.changes = around
        if around.kept:
            around.add(mine)


def note_communication() -> None:
    """Note that a function averages over processes."""
    if _passes.changes is not _NONE:
        _passes.changes.communicates = True


def note_entry(policy: Any) -> None:
    """Note that gradients have entered a scope with this policy's entry scale."""
    _passes.entered.add(policy)


def entered() -> set[Any]:
    """The policies noted in this thread since `take_entered` was called last."""
    return set(_passes.entered)


def take_entered() -> set[Any]:
    """The policies noted in this thread since this was asked last."""
    policies = entered()
    _passes.entered.clear()
    return policies


@contextmanager
def noted(loss_scale: float | None, *, chainers: bool = False) -> Iterator[None]:
    """A pass with this loss scale runs within it; chainers: by Chainer's own engine."""
    around = _passes.scale, _passes.chainers
    if around[0] is None:
        _passes.number += 1
    # A pass inside another one is a part of it: its gradients carry the same scale.
    _passes.scale, _passes.chainers = float(loss_scale or around[0] or 1), chainers
    try:
        yield
    finally:
        _passes.scale, _passes.chainers = around
