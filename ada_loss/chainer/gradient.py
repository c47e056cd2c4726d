"""Gradients in flight, arrays that carry an exponent, and `align`, the one primitive for adding several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ada_loss.casting import cast
from ada_loss.statistics import largest_magnitude, module_of

_FLOAT32_EXPONENTS = 100
"""Multiplying float32 by a power of two of at most this exponent cannot leave the range of the factor."""


HEADROOM = 6
"""How many powers of two a sum keeps to the largest number of its format when its exponent is raised."""


class InFlight(NamedTuple):
    """The true gradient is `array` * 2**-`exponent`."""

    array: Any
    exponent: int = 0


def shifted(array: Any, shift: int, dtype: Any = None) -> Any:
    """`array` * 2**`shift`, rounded once to `dtype` (default: the array's own).

    The array itself if nothing changes. float16 goes through float32, where the product is exact.
    """
    dtype = np.dtype(dtype or array.dtype)
    if shift == 0:
        return cast(array, dtype)
    wide = cast(array, np.promote_types(array.dtype, np.float32))
    while shift:
        step = max(-_FLOAT32_EXPONENTS, min(shift, _FLOAT32_EXPONENTS))
        wide = wide * wide.dtype.type(2.0**step)
        shift -= step
    # NumPy makes a scalar of an array without axes.
    return cast(module_of(array).asarray(wide), dtype)


Peaks = Callable[[Sequence[InFlight]], list[float]]
"""Tells the largest magnitudes of several gradients' arrays."""


def largest_magnitudes(gradients: Sequence[InFlight]) -> list[float]:
    """The largest magnitude of each array, by looking; on a GPU this waits for it."""
    return [largest_magnitude(gradient.array) for gradient in gradients]


def align(gradients: Sequence[InFlight], peaks: Peaks = largest_magnitudes) -> tuple[list[Any], int]:
    """Bring gradients to one exponent: the largest, not above theirs, at which their sum cannot overflow.

    None is raised so far that the sum has less than `HEADROOM` left, for sums and factors on the way to the
    next decision point. Gradients whose exponents agree stay as they are in formats wider than float16.
    `peaks` is only asked for others. Returns the arrays, new ones where they differ, and the exponent.
    """
    exponents = {gradient.exponent for gradient in gradients}
    target = max(exponents)
    if len(exponents) > 1 or (len(gradients) > 1 and any(g.array.dtype == np.float16 for g in gradients)):
        target = _safe_exponent(gradients, peaks(gradients), target)
    return [shifted(gradient.array, target - gradient.exponent) for gradient in gradients], target


def add(gradients: Sequence[InFlight], peaks: Peaks = largest_magnitudes, *, wide: bool = False) -> InFlight:
    """The sum of gradients in flight, aligned and added from left to right as Chainer adds them.

    wide: whether a sum of float16 gradients stays float32.
    """
    if len(gradients) == 1:
        return gradients[0]
    dtype = gradients[0].array.dtype
    widest = np.promote_types(dtype, np.float32)
    if wide:
        dtype = widest
        gradients = [InFlight(cast(array, dtype), exponent) for array, exponent in gradients]
    arrays, exponent = align(gradients, peaks)
    total, *rest = (cast(array, widest) for array in arrays)
    for array in rest:
        total = total + array
    return InFlight(cast(module_of(arrays[0]).asarray(total), dtype), exponent)


def _safe_exponent(gradients: Sequence[InFlight], peaks: list[float], largest: int) -> int:
    # Gradients that are aligned without being added may be of several types.
    limits = {float(np.finfo(gradient.array.dtype).max) for gradient in gradients}
    limit = min(limits)
    present = [(peak, g.exponent) for peak, g in zip(peaks, gradients, strict=True) if peak]
    smallest = min((exponent for _, exponent in present), default=largest)
    # At the smallest exponent nothing is scaled up, so Python's own range is enough.
    total = math.fsum(math.ldexp(peak, smallest - exponent) for peak, exponent in present)
    if not total or not math.isfinite(total):
        return largest
    room = -math.frexp(total / limit)[1]
    if len(limits) == 1:
        # None of so many can be larger than the limit, whatever is taken for their peaks.
        room = max(room, -(len(gradients) - 1).bit_length())
    return min(largest, smallest + max(room - HEADROOM, min(room, 0)))
