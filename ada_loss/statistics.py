"""Moments and extremes of an array, everything that the rules ask for, in one pass.

Works on NumPy and CuPy arrays of float16, float32 and float64. On NumPy the array is read in chunks that
stay in the cache, so no temporary of its size exists; on CuPy the results come over in one transfer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

CHUNK = 1 << 15
"""Elements read at a time on NumPy: few enough for the cache, enough to drown the cost of the calls."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of an array; where `finite` is False, the other figures mean nothing.

    count, nonzero: how many elements there are, and how many are not zero.
    sum_squares: the sum of the squares.
    largest, smallest: the largest and the smallest nonzero magnitude, 0 where every element is zero.
    sum_logs, sum_squared_logs: sums of ln|x| and (ln|x|)^2 over the nonzero elements; 0 unless asked for.
    """

    count: int
    nonzero: int
    sum_squares: float
    largest: float
    smallest: float
    finite: bool
    sum_logs: float = 0.0
    sum_squared_logs: float = 0.0

    @property
    def mean_square(self) -> float:
        """E[x^2] over all elements, zeros included."""
        return self.sum_squares / self.count if self.count else 0.0

    @property
    def log_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of ln|x| over the nonzero elements."""
        if not self.nonzero:
            return 0.0, 0.0
        mean = self.sum_logs / self.nonzero
        return mean, math.sqrt(max(0.0, self.sum_squared_logs / self.nonzero - mean * mean))


_MASKS = {
    kind.itemsize: (kind.type(np.iinfo(kind).max >> 1), kind.type(1))
    for kind in map(np.dtype, ("u2", "u4", "u8"))
}
"""By size of the elements: the bits that make up a float's magnitude, and a one of the same integer type."""

NOTHING = Statistics(0, 0, 0.0, 0.0, 0.0, True)
ONE = Statistics(1, 1, 1.0, 1.0, 1.0, True)
UNUSABLE = Statistics(0, 0, 0.0, 0.0, 0.0, False)


def module_of(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever the array belongs to."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def summarize(array: Any, *, logs: bool = False) -> Statistics:
    """Statistics of a floating-point array of any shape, contiguous or not; with `logs` of ln|x| too."""
    if array.size == 0:
        return NOTHING
    if module_of(array) is not np:
        return _summarize_on_device(array, logs)
    chunks = np.nditer(array, ["external_loop", "buffered"], order="K", buffersize=CHUNK)
    return merge([_summarize_chunk(np.asarray(chunk), logs) for chunk in chunks])


def largest_magnitude(array: Any) -> float:
    """max|x|, 0 for an empty array; infinity or NaN where there is one."""
    if not array.size:
        return 0.0
    if module_of(array) is np and array.flags.c_contiguous and array.dtype.itemsize in _MASKS:
        mask, _ = _MASKS[array.itemsize]
        return float((array.view(mask.dtype) & mask).max().view(array.dtype))
    return float(abs(array).max())


def all_finite(arrays: list[Any]) -> bool:
    """Whether every element of every array is finite; on a GPU with one transfer for all of them."""
    on_host = [array for array in arrays if module_of(array) is np]
    if not all(math.isfinite(largest_magnitude(array)) for array in on_host):
        return False
    on_device = [array for array in arrays if module_of(array) is not np and array.size]
    if not on_device:
        return True
    xp = module_of(on_device[0])
    return bool(xp.stack([xp.isfinite(array).all() for array in on_device]).all())


def merge(parts: list[Statistics]) -> Statistics:
    """Statistics of several arrays taken together, from the statistics of each."""
    if len(parts) == 1:
        return parts[0]
    if not all(part.finite for part in parts):
        return UNUSABLE
    return Statistics(
        count=sum(part.count for part in parts),
        nonzero=sum(part.nonzero for part in parts),
        sum_squares=math.fsum(part.sum_squares for part in parts),
        largest=max((part.largest for part in parts), default=0.0),
        smallest=min((part.smallest for part in parts if part.nonzero), default=0.0),
        finite=True,
        sum_logs=math.fsum(part.sum_logs for part in parts),
        sum_squared_logs=math.fsum(part.sum_squared_logs for part in parts),
    )


def _summarize_chunk(chunk: np.ndarray, logs: bool) -> Statistics:
    """Statistics of a contiguous vector, by way of its bits: without the sign they order as the magnitudes
    do, and integers are several times faster than float16 arithmetic."""
    mask, one = _MASKS[chunk.itemsize]
    bits = chunk.view(mask.dtype) & mask
    largest = float(bits.max().view(chunk.dtype))
    if not math.isfinite(largest):
        return UNUSABLE
    nonzero = int(np.count_nonzero(bits))
    if not nonzero:
        return Statistics(chunk.size, 0, 0.0, 0.0, 0.0, True)
    magnitudes = _widen(bits, chunk.dtype)
    logarithms = np.log(magnitudes[bits > 0], dtype=np.float64) if logs else np.zeros(1)
    # Not the dot product: BLAS would wake threads that others are using.
    sum_squares = float(np.square(magnitudes).sum(dtype=np.float64))
    bits -= one  # zero becomes the largest integer, so the minimum passes it over
    return Statistics(
        count=chunk.size,
        nonzero=nonzero,
        sum_squares=sum_squares,
        largest=largest,
        smallest=float((bits.min() + one).view(chunk.dtype)),
        finite=True,
        sum_logs=float(logarithms.sum()),
        sum_squared_logs=float(logarithms @ logarithms),
    )


def _widen(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The finite magnitudes with these bits, in a type in which their squares neither overflow nor vanish."""
    if dtype != np.float16:
        return bits.view(dtype).astype(np.float64, copy=False)
    # Shifted into place, exponent and mantissa of a float16 are those of a float32 2**112 times as small.
    magnitudes = np.left_shift(bits, 13, dtype=np.uint32).view(np.float32)
    magnitudes *= np.float32(2.0**112)
    return magnitudes


def _summarize_on_device(array: Any, logs: bool) -> Statistics:
    xp = module_of(array)
    magnitudes = xp.abs(array).astype(np.float64)
    present = magnitudes > 0
    figures = [
        xp.count_nonzero(present),
        xp.square(magnitudes).sum(),
        magnitudes.max(),
        xp.where(present, magnitudes, np.inf).min(),
    ]
    if logs:
        logarithms = xp.log(xp.where(present, magnitudes, 1.0))
        figures += [logarithms.sum(), xp.square(logarithms).sum()]
    nonzero, sum_squares, largest, smallest, *log_sums = xp.stack(
        [f.astype(np.float64) for f in figures]
    ).tolist()
    if not math.isfinite(largest):
        return UNUSABLE
    return Statistics(
        array.size, int(nonzero), sum_squares, largest, smallest if nonzero else 0.0, True, *log_sums
    )


def extremes_by_row(matrix: Any) -> list[tuple[float, float]]:
    """Smallest nonzero and largest magnitude in every row of a matrix, (0, 0) for a row of zeros."""
    xp = module_of(matrix)
    magnitudes = xp.abs(matrix).astype(np.float64)
    low = xp.where(magnitudes > 0, magnitudes, np.inf).min(axis=1)
    high = magnitudes.max(axis=1)
    return [(low if high else 0.0, high) for low, high in xp.stack([low, high], axis=1).tolist()]
