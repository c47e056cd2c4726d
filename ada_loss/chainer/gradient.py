"""Scaled gradients, arrays that carry an exponent, and `align`, the one primitive for adding several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from chainer.functions.math.basic_math import Add, MultiAdd

from ada_loss.arrays.library import amax_of, cast, library_of
from ada_loss.core.alignment import HEADROOM, aligned_exponent

_FLOAT32_EXPONENTS = 100
"""Multiplying float32 by a power of two of at most this exponent cannot leave the range of the factor."""


class ScaledGradient(NamedTuple):
    """The true gradient is `array` * 2**-`exponent`."""

    array: Any
    exponent: int = 0


def shifted(array: Any, shift: int, dtype: Any = None, *, reuse: bool = False) -> Any:
    """`array` * 2**`shift`, rounded once to `dtype` (default: the array's own).

    The array itself if nothing changes. float16 goes through float32, where the product is exact.
    reuse: whether the array's memory may be written to, as nobody else needs it.
    """
    dtype = np.dtype(dtype or array.dtype)
    if shift == 0:
        return cast(array, dtype)
    xp = library_of(array).module
    wide = cast(array, np.promote_types(array.dtype, np.float32))
    while shift:
        step = max(-_FLOAT32_EXPONENTS, min(shift, _FLOAT32_EXPONENTS))
        own = (wide is not array or reuse) and 0 not in wide.strides
        # NumPy makes a scalar of an array without axes.
        out = wide if own else _empty_in_same_order(wide)
        wide = xp.asarray(xp.multiply(wide, wide.dtype.type(2.0**step), out=out))
        shift -= step
    return cast(wide, dtype)


def _empty_in_same_order(array: Any) -> Any:
    """A new array that lies in memory as `array` does, apart, backwards or repeated, on which the bits of a
    product depend; None where NumPy's own results lie as they should."""
    if not isinstance(array, np.ndarray) or not array.size or array.flags.forc:
        return None
    reaches = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    before = -sum(reach for reach in reaches if reach < 0)
    memory = np.empty(before + sum(reach for reach in reaches if reach > 0) + array.itemsize, np.uint8)
    return np.ndarray(array.shape, array.dtype, memory, before, array.strides)


Amaxes = Callable[[Sequence[ScaledGradient]], list[float]]
"""Tells the largest magnitudes of several gradients' arrays."""


def amaxes_of(gradients: Sequence[ScaledGradient]) -> list[float]:
    """The largest magnitude of each array, by looking; on a GPU this waits for it."""
    return [amax_of(gradient.array) for gradient in gradients]


class Accumulation(NamedTuple):
    """A place at which gradients are brought to one exponent.

    amaxes: tells how large they are. headroom: how many powers of two their sum keeps to the largest number
    of its format if one of them is raised.
    """

    amaxes: Amaxes = amaxes_of
    headroom: int = HEADROOM


UNKNOWN_PLACE = Accumulation()
"""A place of which nothing is known, so that gradients that meet there are looked at."""


def align(
    gradients: Sequence[ScaledGradient], accumulation: Accumulation = UNKNOWN_PLACE
) -> tuple[list[Any], int]:
    """Bring gradients to one exponent: the largest, not above theirs, at which their sum cannot overflow.

    None is raised so far that the sum has less than the headroom left, for sums and factors on the way to the
    next decision point. Gradients whose exponents agree stay as they are in formats wider than float16, and
    nobody asks how large they are. Returns the arrays, new ones where they differ, and the exponent.
    """
    target = _common_exponent(gradients, accumulation, {gradient.array.dtype for gradient in gradients})
    return [shifted(gradient.array, target - gradient.exponent) for gradient in gradients], target


def add(
    gradients: Sequence[ScaledGradient], accumulation: Accumulation = UNKNOWN_PLACE, *, wide: bool = False
) -> ScaledGradient:
    """The sum of scaled gradients at the exponent that `align` finds, added from left to right as Chainer
    adds them; that of float16 ones in float32, and rounded once, or not at all if `wide`."""
    if len(gradients) == 1:
        return gradients[0]
    dtype = gradients[0].array.dtype
    widest = np.promote_types(dtype, np.float32)
    dtype = widest if wide else dtype
    exponent = _common_exponent(gradients, accumulation, {dtype})
    parts = (shifted(array, exponent - carried, widest) for array, carried in gradients)
    # By Chainer's own functions: where memory orders meet, that of the sum depends on the function, and on it
    # the bits of later sums.
    function = Add() if len(gradients) == 2 else MultiAdd()
    (total,) = function.forward((next(parts), next(parts)))
    for part in parts:
        total += part
    return ScaledGradient(cast(total, dtype), exponent)


def _common_exponent(
    gradients: Sequence[ScaledGradient], accumulation: Accumulation, dtypes: set[np.dtype[Any]]
) -> int:
    exponents = [gradient.exponent for gradient in gradients]
    agree = len(set(exponents)) == 1
    if agree and (len(gradients) == 1 or np.dtype(np.float16) not in dtypes):
        return exponents[0]
    # Gradients that are aligned without being added may be of several types.
    limit = min(float(np.finfo(dtype).max) for dtype in dtypes)
    amaxes = accumulation.amaxes(gradients)
    return aligned_exponent(
        amaxes, exponents, limit, headroom=accumulation.headroom, bounded=len(dtypes) == 1
    )
