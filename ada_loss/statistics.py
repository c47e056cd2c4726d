"""Moments and extremes of an array, everything that the rules ask for, in one pass.

Works on NumPy and CuPy arrays of float16, float32 and float64. On NumPy the array is read in chunks that stay in
the cache, so no temporary of its size exists; on CuPy the results come over in one transfer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

CHUNK = 1 << 15


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


NOTHING = Statistics(0, 0, 0.0, 0.0, 0.0, True)
UNUSABLE = Statistics(0, 0, 0.0, 0.0, 0.0, False)


def module_of(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever the array belongs to."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def summarize(array: Any, *, logs: bool = False) -> Statistics:
    """Statistics of a floating-point array of any shape, contiguous or not; `logs` adds the moments of ln|x|."""
    if array.size == 0:
        return NOTHING
    if module_of(array) is not np:
        return _summarize_on_device(array, logs)
    parts = [_summarize_chunk(chunk, logs) for chunk in _chunks(array)]
    return merge(parts)


def merge(parts: list[Statistics]) -> Statistics:
    """Statistics of several arrays taken together, from the statistics of each."""
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


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    flat = array.ravel(order="K")
    return [flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK)]


def _summarize_chunk(chunk: np.ndarray, logs: bool) -> Statistics:
    magnitudes = np.abs(chunk.astype(np.float64))
    largest = float(magnitudes.max())
    if not math.isfinite(largest):
        return UNUSABLE
    if largest == 0.0:
        return Statistics(chunk.size, 0, 0.0, 0.0, 0.0, True)
    sum_squares = float(magnitudes @ magnitudes)
    present = magnitudes[magnitudes > 0]
    logarithms = np.log(present) if logs else present[:0]
    return Statistics(
        count=chunk.size,
        nonzero=present.size,
        sum_squares=sum_squares,
        largest=largest,
        smallest=float(present.min()),
        finite=True,
        sum_logs=float(logarithms.sum()),
        sum_squared_logs=float(logarithms @ logarithms),
    )


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
    nonzero, sum_squares, largest, smallest, *log_sums = xp.stack([f.astype(np.float64) for f in figures]).tolist()
    if not math.isfinite(largest):
        return UNUSABLE
    return Statistics(array.size, int(nonzero), sum_squares, largest, smallest if nonzero else 0.0, True, *log_sums)


def channel_extremes(array: Any, axis: int) -> list[tuple[float, float]]:
    """Smallest nonzero and largest magnitude in every slice along `axis`, (0, 0) for a slice of zeros."""
    xp = module_of(array)
    slices = xp.abs(xp.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)).astype(np.float64)
    low = xp.where(slices > 0, slices, np.inf).min(axis=1)
    high = slices.max(axis=1)
    return [(low if high else 0.0, high) for low, high in xp.stack([low, high], axis=1).tolist()]
