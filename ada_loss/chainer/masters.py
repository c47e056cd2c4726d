"""float32 masters: what parameters are while an optimizer updates them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import chainer
import numpy as np

from ada_loss.arrays.library import cast
from ada_loss.chainer.parameters import Gradient, ScaledParameter


@contextmanager
def true_gradients_on_masters(
    parameters: Iterable[ScaledParameter], keep: Collection[int] = ()
) -> Iterator[None]:
    """Within it every parameter is its float32 master with its true gradient, as Chainer's own parameters
    are.

    Optimizers and hooks need not know of float16: what they see is float32 training. At the end the float16
    arrays receive the rounded masters, in place, and the gradients are as before.

    A true gradient is made when somebody asks for it, and is there until the end. Where it is only the
    parameter's update that asks, it is given up after it, so that just one exists at a time.

    parameters: each once; uninitialized ones stay as they are. keep: ids of those whose gradient somebody may
    look at after their update.
    """
    # Every parameter that has been exposed is concealed, even if memory is too short for rounding another.
    with ExitStack() as exposed:
        for parameter in parameters:
            if parameter.array is not None:
                with chainer.using_device(parameter.device):
                    before = _expose(parameter, once=id(parameter) not in keep)
                exposed.callback(_conceal, parameter, *before)
        yield


def _expose(parameter: ScaledParameter, *, once: bool) -> tuple[Any, Gradient]:
    half = parameter.array
    if half.dtype == np.float16:
        # Before anything else, since memory may be too short for it.
        parameter.master = _reconciled(parameter.master, half)
    gradient = parameter.expose_to_update(once=once)
    if half.dtype == np.float16:
        parameter.array = parameter.master
    return half, gradient


def _conceal(parameter: ScaledParameter, half: Any, gradient: Gradient) -> None:
    try:
        if half.dtype == np.float16:
            with chainer.using_device(parameter.device):
                parameter.master = cast(parameter.array, np.float32)
                half[...] = cast(parameter.master, np.float16)
    finally:
        if half.dtype == np.float16:
            parameter.array = half
        parameter.conceal(gradient)


def _reconciled(master: Any, half: Any) -> Any:
    """The master, except where the parameter was changed behind it (a file loaded, weights copied or
    clipped)."""
    if master is None or master.shape != half.shape:
        return cast(half, np.float32)
    # Bits compare faster than float16, and what nobody touched has those of the rounded master.
    changed = cast(master, np.float16).view(np.int16) != half.view(np.int16)
    xp = chainer.backend.get_array_module(half)
    if xp is np and not changed.any():
        return master
    return xp.where(changed, cast(half, np.float32), master)
