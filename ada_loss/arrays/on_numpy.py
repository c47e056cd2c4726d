"""NumPy: an array is read in chunks that stay in the cache, so no temporary of its size exists."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ada_loss.arrays import casting, extremes
from ada_loss.arrays.extremes import MASKS
from ada_loss.core.deferred import Ready
from ada_loss.core.measurement import EMPTY, UNUSABLE, Statistics, merge

CHUNK = 1 << 17
"""Elements read at a time on NumPy: few enough for the cache, enough to drown the cost of the calls."""

DOT = 1 << 13
"""Elements of one dot product."""


_SUMMABLE = 2.0**500
"""Of magnitudes below, float64 can sum the squares of as many as a vector has."""

_SQUARABLE = 2.0**-50
"""Where the largest magnitude of a vector is between this and its inverse, float32 can sum its squares."""


class NumPy:
    """A `Library` of arrays in the memory of the processor: every result is ready."""

    module: ModuleType = np

    on_host = True

    def cast(self, array: Any, dtype: Any) -> Any:
        return casting.cast(array, dtype)

    def summarize(self, array: Any, *, amin: bool = False, logs: bool = False) -> Ready[Statistics]:
        if array.size == 0:
            return Ready(EMPTY)
        if array.size <= CHUNK and array.flags.forc:
            return Ready(_summarize_chunk(array.ravel("K"), amin, logs))
        return Ready(merge([_summarize_chunk(chunk, amin, logs) for chunk in _chunks(array)]))

    def amax(self, array: Any) -> Ready[float]:
        return Ready(_amax(array))

    def product_extremes(self, gy_rows: Any, weight_rows: Any) -> Ready[tuple[float, float]]:
        if not gy_rows.size or not weight_rows.size:
            return Ready((0.0, 0.0))
        return Ready(extremes.pair(extremes.product_extremes(np, gy_rows, weight_rows).tolist()))

    def all_finite(self, arrays: Sequence[Any]) -> bool:
        return all(math.isfinite(_amax(array)) for array in arrays)


def library() -> NumPy:
    """NumPy, which is always there."""
    return NumPy()


def _amax(array: Any) -> float:
    if not array.size:
        return 0.0
    if array.itemsize in MASKS:
        flat, (mask, _) = array.ravel("K"), MASKS[array.itemsize]
        return abs(flat.item((flat.view(mask.dtype) & mask).argmax()))
    return float(abs(array).max())


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements in contiguous vectors of at most CHUNK each, in any order."""
    if array.flags.forc:
        flat = array.ravel("K")
        return (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    chunks = np.nditer(array, ["external_loop", "buffered"], order="K", buffersize=CHUNK)
    return map(np.asarray, chunks)


def _summarize_chunk(chunk: np.ndarray, amin: bool, logs: bool) -> Statistics:
    """Statistics of a contiguous vector, by way of its bits: without the sign they order as the magnitudes
    do, and integers are several times faster than float16 arithmetic."""
    mask, one = MASKS[chunk.itemsize]
    bits = chunk.view(mask.dtype) & mask
    amax = abs(chunk.item(bits.argmax()))
    if not math.isfinite(amax):
        return UNUSABLE
    if not amax:
        return Statistics(chunk.size, 0, 0.0, 0.0, 0.0, True)
    nonzero = int(np.count_nonzero(bits))
    magnitudes = _squarable(bits, chunk.dtype, amax)
    sum_squares = _sum_squares(magnitudes) if amax < _SUMMABLE else math.inf
    low = sum_logs = sum_squared_logs = 0.0
    if logs:
        # With a one in the place of every zero. Their spread is a small difference of large sums.
        logarithms = np.log(magnitudes + (bits == 0)).astype(np.float64)
        sum_logs, sum_squared_logs = float(logarithms.sum()), _sum_squares(logarithms)
    if amin:
        bits -= one  # zero becomes the largest integer, so the minimum passes it over
        low = abs(chunk.item(bits.argmin()))
    return Statistics(chunk.size, nonzero, sum_squares, amax, low, True, sum_logs, sum_squared_logs)


def _squarable(bits: np.ndarray, dtype: np.dtype, amax: float) -> np.ndarray:
    """The finite magnitudes with these bits, in a type that holds the square of the largest and of all that
    count beside it."""
    if dtype == np.float16:
        return casting.magnitudes_to_float32(bits)
    magnitudes = bits.view(dtype)
    return magnitudes if _SQUARABLE < amax < 1 / _SQUARABLE else magnitudes.astype(np.float64, copy=False)


def _sum_squares(vector: np.ndarray) -> float:
    """The sum of the squares, a part at a time: for longer vectors BLAS would wake threads that others use,
    and sums in float32 lose more."""
    if vector.size <= DOT:
        return float(vector.dot(vector))
    total = 0.0
    for start in range(0, vector.size, DOT):
        part = vector[start : start + DOT]
        total += float(part.dot(part))
    return total
