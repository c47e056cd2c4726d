"""Function hooks: they are handed true gradients, and what they change in place counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chainer
import numpy as np

from ada_loss.arrays.library import amax_of
from ada_loss.chainer import backward_state
from ada_loss.chainer.gradient import shifted
from ada_loss.core.maths import floor_log2

Gradients = tuple[tuple[Any, ...], int]
"""Arrays or None, and the exponent that all of them carry."""


@contextmanager
def hooked(function: Any, gys: tuple[Any, ...], exponent: int) -> Iterator[Gradients]:
    """The user's function hooks, called before and after what is done within it, on the function's device.

    They see the true gradient, that of float16 in float32. gys: arrays or None, which carry `exponent`. Gives
    the gradients as the hooks leave them.
    """
    in_data = tuple(x.data for x in function.inputs)
    hooks = _hooks_of(function)
    with chainer.using_device(chainer.backend.get_device_from_array(*in_data, *gys)):
        if not hooks:
            yield gys, exponent
            return
        seen = tuple(None if gy is None else _true(gy, exponent) for gy in gys)
        with backward_state.carrying(0, hook=True):
            for hook in hooks:
                hook.backward_preprocess(function, in_data, seen)
        yield _taken_back(seen, gys, exponent)
        with backward_state.carrying(0, hook=True):
            for hook in hooks:
                hook.backward_postprocess(function, in_data, seen)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Within it no function hooks of this thread are called."""
    hooks = chainer.get_function_hooks()
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)


def _hooks_of(function: Any) -> list[Any]:
    """The hooks of this thread and of the function itself that are called in backward."""
    hooks = dict(chainer.get_function_hooks())
    if function._n_local_function_hooks:
        hooks.update(function.local_function_hooks)
    return [hook for hook in hooks.values() if _is_called(hook)]


def _is_called(hook: chainer.FunctionHook) -> bool:
    idle = chainer.FunctionHook.backward_preprocess, chainer.FunctionHook.backward_postprocess
    mine = hook.backward_preprocess, hook.backward_postprocess
    return any(getattr(method, "__func__", None) is not none for method, none in zip(mine, idle, strict=True))


def _true(gy: Any, exponent: int) -> Any:
    true = shifted(gy, -exponent, np.promote_types(gy.dtype, np.float32))
    if true is not gy and not _is_writeable(gy):
        true.flags.writeable = False
    return true


def _taken_back(seen: tuple[Any, ...], gys: tuple[Any, ...], exponent: int) -> Gradients:
    """True gradients as they are after a hook, as `gys` were before, which carry `exponent`.

    As in plain Chainer, what a hook changes in place changes for all that share the array. In float16, where
    the changed one may need another exponent, it does not; it is as large there as before.
    """
    pairs = [(new, old) for new, old in zip(seen, gys, strict=True) if old is not None]
    halves = [(new, old) for new, old in pairs if old.dtype == np.float16]
    if not halves:
        for new, old in pairs:
            if new is not old and _is_writeable(old):
                old[...] = shifted(new, exponent)
        return gys, exponent
    before = max(amax_of(old) for _, old in halves)
    after = max(amax_of(new) for new, _ in halves)
    if 0 < before < np.inf and 0 < after < np.inf:
        exponent = floor_log2(before) - floor_log2(after)
    back = (shifted(new, exponent, old.dtype) for new, old in pairs)
    return tuple(None if gy is None else next(back) for gy in gys), exponent


def _is_writeable(array: Any) -> bool:
    # CuPy's arrays always are, and have no such flag.
    return getattr(array.flags, "writeable", True)
