"""Moments and extremes of an array, everything that the rules ask for, in one pass.

Works on NumPy and CuPy arrays of float16, float32 and float64. On NumPy the array is read in chunks that
stay in the cache, so no temporary of its size exists; on CuPy a kernel of its own reads it once
(`device_statistics`), and the figures of many arrays come over in one transfer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from operator import itemgetter
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ada_loss.arrays import device_statistics
from ada_loss.arrays.casting import magnitudes_to_float32

T = TypeVar("T")

CHUNK = 1 << 17
"""Elements read at a time on NumPy: few enough for the cache, enough to drown the cost of the calls."""

DOT = 1 << 13
"""Elements of one dot product."""


class Statistics(NamedTuple):
    """Statistics of an array; where `finite` is False, the other figures mean nothing.

    size, nonzero: how many elements there are, and how many are not zero.
    sum_squares: the sum of the squares.
    largest: the largest magnitude, 0 where every element is zero.
    smallest: the smallest nonzero magnitude, 0 where every element is zero; 0 unless asked for.
    sum_logs, sum_squared_logs: sums of ln|x| and (ln|x|)^2 over the nonzero elements; 0 unless asked for.
    """

    size: int
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
        return self.sum_squares / self.size if self.size else 0.0

    @property
    def log_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of ln|x| over the nonzero elements."""
        if not self.nonzero:
            return 0.0, 0.0
        mean = self.sum_logs / self.nonzero
        return mean, math.sqrt(max(0.0, self.sum_squared_logs / self.nonzero - mean * mean))


# Arrays without dimensions, because they are cheaper operands than scalars.
_MASKS = {
    kind.itemsize: (np.array(np.iinfo(kind).max >> 1, kind), np.array(1, kind))
    for kind in map(np.dtype, ("u2", "u4", "u8"))
}
"""By size of the elements: the bits that make up a float's magnitude, and a one of the same integer type."""

_SQUARABLE = 2.0**-50
"""Where the largest magnitude of a vector is between this and its inverse, float32 can sum its squares."""

NOTHING = Statistics(0, 0, 0.0, 0.0, 0.0, True)
ONE = Statistics(1, 1, 1.0, 1.0, 1.0, True)
UNUSABLE = Statistics(0, 0, 0.0, 0.0, 0.0, False)


def module_of(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever the array belongs to."""
    cls: Any = type(array)
    return _module_of_class(cls)


@cache
def _module_of_class(cls: Any) -> ModuleType:
    return sys.modules[cls.__module__.partition(".")[0]]


@dataclass(frozen=True)
class OnDevice(Generic[T]):
    """A result whose figures a GPU still computes.

    vectors: of float64 on the device, which hold the figures. build: makes the result of them, in order.
    """

    vectors: tuple[Any, ...]
    build: Callable[[list[float]], T]

    @property
    def count(self) -> int:
        """How many figures there are."""
        return sum(vector.size for vector in self.vectors)


Begun: TypeAlias = T | OnDevice[T]
"""A result of type T: ready where it was computed on the host, still on its way on a GPU. `fetch` tells."""


def fetch(begun: Sequence[Begun[T]]) -> list[T]:
    """The results of everything begun, in the same order; one transfer brings all of a GPU over."""
    vectors = _vectors(begun)
    if not vectors:
        return list(begun)  # type: ignore[arg-type]
    return _built(begun, module_of(vectors[0]).concatenate(vectors).tolist())


def combine(build: Callable[..., T], *parts: Begun[Any]) -> Begun[T]:
    """What `build` makes of several results: at once where all are ready, else when it is fetched."""
    for part in parts:
        if isinstance(part, OnDevice):
            return OnDevice(tuple(_vectors(parts)), lambda figures: build(*_built(parts, figures)))
    return build(*parts)


def _vectors(begun: Sequence[Begun[Any]]) -> list[Any]:
    return [vector for each in begun if isinstance(each, OnDevice) for vector in each.vectors]


def _built(begun: Sequence[Begun[T]], figures: list[float]) -> list[T]:
    """The results, given the figures of those that a GPU has computed."""
    remaining = iter(figures)
    return [
        each.build(list(islice(remaining, each.count))) if isinstance(each, OnDevice) else each
        for each in begun
    ]


def summarize(array: Any, *, smallest: bool = False, logs: bool = False) -> Statistics:
    """What `begin` describes; on a GPU this waits for it."""
    return fetch([begin(array, smallest=smallest, logs=logs)])[0]


def begin(array: Any, *, smallest: bool = False, logs: bool = False) -> Begun[Statistics]:
    """Statistics of a floating-point array of any shape, contiguous or not, without waiting for a GPU.

    smallest, logs: whether to look for the smallest magnitude, and to add up ln|x| and its square.
    """
    if array.size == 0:
        return NOTHING
    if module_of(array) is not np:
        return _begin_on_device(array, smallest, logs)
    if array.size <= CHUNK and array.flags.forc:
        return _summarize_chunk(array.ravel("K"), smallest, logs)
    return merge([_summarize_chunk(chunk, smallest, logs) for chunk in _chunks(array)])


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The elements in contiguous vectors of at most CHUNK each, in any order."""
    if array.flags.forc:
        flat = array.ravel("K")
        return (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    chunks = np.nditer(array, ["external_loop", "buffered"], order="K", buffersize=CHUNK)
    return map(np.asarray, chunks)


def begin_product_extremes(gy_rows: Any, weight_rows: Any) -> Begun[tuple[float, float]]:
    """Smallest nonzero and largest |gy * W| over every pair in the same row, (0, 0) where there is none.

    gy_rows, weight_rows: matrices of floats with a row for each channel. Where one is not finite, the result
        means nothing. Does not wait for a GPU.
    """
    if not gy_rows.size or not weight_rows.size:
        return 0.0, 0.0
    xp = module_of(gy_rows)
    gy_low, gy_high = _extremes_by_row(gy_rows)
    weight_low, weight_high = _extremes_by_row(weight_rows)
    meets = (gy_high > 0) & (weight_high > 0)
    with np.errstate(over="ignore", invalid="ignore"):
        low = xp.where(meets, gy_low * weight_low, np.inf).min()
        high = (gy_high * weight_high).max()
    figures = xp.stack([low, high])
    return _product_extremes(figures.tolist()) if xp is np else OnDevice((figures,), _product_extremes)


def _product_extremes(figures: list[float]) -> tuple[float, float]:
    low, high = figures
    return (low if high else 0.0), high


def _extremes_by_row(matrix: Any) -> tuple[Any, Any]:
    """Smallest nonzero and largest magnitude in every row, vectors of float64; 0 and 0 for a row of zeros."""
    # As scalars: CuPy takes no arrays of NumPy's.
    mask, one = (array[()] for array in _MASKS[matrix.itemsize])
    bits = matrix.view(mask.dtype) & mask
    high = bits.max(axis=1)
    bits -= one  # as in _summarize_chunk
    low = bits.min(axis=1) + one
    return low.view(matrix.dtype).astype(np.float64), high.view(matrix.dtype).astype(np.float64)


def largest_magnitude(array: Any) -> float:
    """max|x| of a floating-point array, 0 for an empty one; infinity or NaN where there is one."""
    if not array.size:
        return 0.0
    if module_of(array) is np and array.itemsize in _MASKS:
        flat, (mask, _) = array.ravel("K"), _MASKS[array.itemsize]
        return abs(flat.item((flat.view(mask.dtype) & mask).argmax()))
    return float(abs(array).max())


def begin_largest(array: Any) -> Begun[float]:
    """What `largest_magnitude` finds, without waiting for a GPU."""
    if not array.size or module_of(array) is np:
        return largest_magnitude(array)
    return OnDevice((device_statistics.figures(module_of(array), array, False),), itemgetter(_LARGEST))


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
        size=sum(part.size for part in parts),
        nonzero=sum(part.nonzero for part in parts),
        sum_squares=sum(part.sum_squares for part in parts),
        largest=max((part.largest for part in parts), default=0.0),
        smallest=min((part.smallest for part in parts if part.nonzero), default=0.0),
        finite=True,
        sum_logs=sum(part.sum_logs for part in parts),
        sum_squared_logs=sum(part.sum_squared_logs for part in parts),
    )


def _summarize_chunk(chunk: np.ndarray, smallest: bool, logs: bool) -> Statistics:
    """Statistics of a contiguous vector, by way of its bits: without the sign they order as the magnitudes
    do, and integers are several times faster than float16 arithmetic."""
    mask, one = _MASKS[chunk.itemsize]
    bits = chunk.view(mask.dtype) & mask
    largest = abs(chunk.item(bits.argmax()))
    if not math.isfinite(largest):
        return UNUSABLE
    if not largest:
        return Statistics(chunk.size, 0, 0.0, 0.0, 0.0, True)
    nonzero = int(np.count_nonzero(bits))
    magnitudes = _squarable(bits, chunk.dtype, largest)
    sum_squares = _sum_squares(magnitudes)
    low = sum_logs = sum_squared_logs = 0.0
    if logs:
        # With a one in the place of every zero. Their spread is a small difference of large sums.
        logarithms = np.log(magnitudes + (bits == 0)).astype(np.float64)
        sum_logs, sum_squared_logs = float(logarithms.sum()), _sum_squares(logarithms)
    if smallest:
        bits -= one  # zero becomes the largest integer, so the minimum passes it over
        low = abs(chunk.item(bits.argmin()))
    return Statistics(chunk.size, nonzero, sum_squares, largest, low, True, sum_logs, sum_squared_logs)


def _squarable(bits: np.ndarray, dtype: np.dtype, largest: float) -> np.ndarray:
    """The finite magnitudes with these bits, in a type that holds the square of the largest and of all that
    count beside it."""
    if dtype == np.float16:
        return magnitudes_to_float32(bits)
    magnitudes = bits.view(dtype)
    return magnitudes if _SQUARABLE < largest < 1 / _SQUARABLE else magnitudes.astype(np.float64, copy=False)


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


def _begin_on_device(array: Any, smallest: bool, logs: bool) -> OnDevice[Statistics]:
    figures = device_statistics.figures(module_of(array), array, logs)
    return OnDevice((figures,), partial(_from_figures, array.size, smallest))


_LARGEST = 2
"""The place of the largest magnitude among the figures that a GPU computes."""


def _from_figures(count: int, smallest: bool, figures: list[float]) -> Statistics:
    nonzero, sum_squares, largest, low, sum_logs, sum_squared_logs = figures
    if not math.isfinite(largest):
        return UNUSABLE
    low = low if smallest and nonzero else 0.0
    return Statistics(count, int(nonzero), sum_squares, largest, low, True, sum_logs, sum_squared_logs)
