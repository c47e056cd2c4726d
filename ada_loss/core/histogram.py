"""Histograms of magnitudes by powers of two, which answer what any loss scale would do to an array.

A power-of-two scale moves a histogram without changing its form. So the counts of one array, taken once, tell
for every scale 2**k which share of it would underflow, lose precision or overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ada_loss.core.formats import FLOAT16, FloatFormat

CHUNK = 1 << 16
"""Elements that are counted at a time, so that temporaries stay in the cache."""

_HALF_CODES = 1 << 15
"""How many codes the magnitudes of float16 have."""


@dataclass(frozen=True)
class Histogram:
    """How many elements have which magnitude; the true values, an exponent that they carried taken out.

    lowest: exponent of the first bin. counts: elements whose magnitude is at least 2**(lowest + i) and below
        the double of it; neither the first nor the last count is 0. zeros: elements that are exactly zero.
    nonfinite: infinities and NaNs. largest: the largest finite magnitude (amax), 0.0 where there is none.

    Args that contradict each other raise a ValueError.
    """

    lowest: int = 0
    counts: tuple[int, ...] = ()
    zeros: int = 0
    nonfinite: int = 0
    largest: float = 0.0

    def __post_init__(self) -> None:
        if min(self.zeros, self.nonfinite, *self.counts, 0) < 0:
            raise ValueError("A histogram counts elements: none of its numbers can be negative.")
        if self.counts and not (self.counts[0] and self.counts[-1]):
            raise ValueError(
                "The first and the last bin of a histogram hold elements; from_counts trims them."
            )
        if not math.isfinite(self.largest) or self._bin_of(self.largest) != len(self.counts) - 1:
            raise ValueError(f"The largest magnitude, {self.largest!r}, is not in the histogram's last bin.")

    @classmethod
    def of(cls, array: Any, exponent: int = 0) -> Histogram:
        """The histogram of an array times 2**-exponent.

        Args:
            array: of float16, float32 or float64, with any shape; anything that NumPy can read.
            exponent: what the array's elements carry: the true value is element * 2**-exponent.

        Raises:
            TypeError: where the elements are of another type.
        """
        values = np.asarray(array)
        if values.dtype.char not in "efd":
            raise TypeError(
                f"Histogram.of counts float16, float32 and float64, not {values.dtype}: cast it to float32."
            )
        flat = values.reshape(-1)
        count = _count_half if values.dtype == np.float16 else _count_wide
        chunks = [count(flat[start : start + CHUNK]) for start in range(0, flat.size, CHUNK)]
        return merge(chunks).scaled(-exponent)

    @classmethod
    def from_counts(
        cls, lowest: int, counts: Sequence[int], *, zeros: int, nonfinite: int, largest: float
    ) -> Histogram:
        """A histogram that somebody else has counted, such as a kernel on a GPU: bins at both ends may be
        empty."""
        filled = [index for index, count in enumerate(counts) if count]
        first, last = (filled[0], filled[-1]) if filled else (0, -1)
        return cls(
            int(lowest) + first if filled else 0,
            tuple(int(count) for count in counts[first : last + 1]),
            int(zeros),
            int(nonfinite),
            float(largest),
        )

    @property
    def nonzero(self) -> int:
        """Finite elements that are not zero."""
        return sum(self.counts)

    @property
    def size(self) -> int:
        """All elements."""
        return self.nonzero + self.zeros + self.nonfinite

    @property
    def highest(self) -> int:
        """The exponent of the last bin."""
        return self.lowest + len(self.counts) - 1

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of the elements of both."""
        return merge((self, other))

    def scaled(self, shift: int) -> Histogram:
        """The histogram of the elements times 2**shift."""
        if not self.counts:
            return self
        return replace(self, lowest=self.lowest + shift, largest=math.ldexp(self.largest, shift))

    def count_below(self, exponent: int) -> int:
        """How many non-zero elements are smaller than 2**exponent."""
        return sum(self.counts[: max(0, exponent - self.lowest)])

    def underflow(self, shift: int = 0, number_format: FloatFormat = FLOAT16) -> float:
        """The share of the non-zero elements that is below the format's smallest number at scale 2**shift.

        Rounding to nearest turns them into zero, or into that number with an error of up to its own size.
        """
        return self._share(self.count_below(_exponent(number_format.smallest_subnormal) - shift))

    def imprecision(self, shift: int = 0, number_format: FloatFormat = FLOAT16) -> float:
        """The share of the non-zero elements that underflows or has less than the full precision at scale
        2**shift, as what is below the format's smallest normal number has."""
        return self._share(self.count_below(_exponent(number_format.smallest_normal) - shift))

    def overflow(self, shift: int = 0, number_format: FloatFormat = FLOAT16) -> float:
        """The share of the non-zero elements that is above the format's largest number at scale 2**shift.

        Of the last power of two that the format reaches into, only the largest element is known exactly: the
        others there count as below. So the share is exact where it is 0, and at most so much too small.
        """
        beyond = self.nonzero - self.count_below(_exponent(number_format.max) + 1 - shift)
        return self._share(beyond or int(self.overflows(shift, number_format)))

    def overflows(self, shift: int = 0, number_format: FloatFormat = FLOAT16) -> bool:
        """Whether any element is above the format's largest number at scale 2**shift: exactly."""
        return bool(self.counts) and (
            self.highest + shift > _exponent(number_format.max)
            or math.ldexp(self.largest, shift) > number_format.max
        )

    def _share(self, count: int) -> float:
        return count / self.nonzero if count else 0.0

    def _bin_of(self, magnitude: float) -> int:
        return _exponent(magnitude) - self.lowest if magnitude > 0 else -1


def merge(histograms: Sequence[Histogram]) -> Histogram:
    """The histogram of the elements of all."""
    filled = [histogram for histogram in histograms if histogram.counts]
    lowest = min((histogram.lowest for histogram in filled), default=0)
    length = max((histogram.highest for histogram in filled), default=-1) + 1 - lowest if filled else 0
    counts = [0] * length
    for histogram in filled:
        for place, count in enumerate(histogram.counts, histogram.lowest - lowest):
            counts[place] += count
    return Histogram(
        lowest,
        tuple(counts),
        sum(histogram.zeros for histogram in histograms),
        sum(histogram.nonfinite for histogram in histograms),
        max((histogram.largest for histogram in filled), default=0.0),
    )


def _exponent(magnitude: float) -> int:
    """That of the largest power of two that is at most `magnitude`."""
    return math.frexp(magnitude)[1] - 1


def _count_half(values: Any) -> Histogram:
    """Every code of float16 is counted by itself: so few are there, and so many gradients subnormal."""
    codes = np.bincount(values.view(np.uint16) & (_HALF_CODES - 1), minlength=_HALF_CODES)
    finite = codes[:0x7C00]
    counts = np.add.reduceat(finite, _half_edges())
    (present,) = np.nonzero(finite)
    largest = float(np.uint16(present[-1]).view(np.float16)) if present.size else 0.0
    return Histogram.from_counts(
        -24, counts.tolist(), zeros=codes[0], nonfinite=codes[0x7C00:].sum(), largest=largest
    )


@functools.cache
def _half_edges() -> Any:
    """The codes of 2**-24, 2**-23, ... 2**15."""
    return np.ldexp(np.float32(1), np.arange(-24, 16)).astype(np.float16).view(np.uint16).astype(np.intp)


def _count_wide(values: Any) -> Histogram:
    """Of float32 and float64 the bits of the exponent are counted; subnormal ones, which are rare, apart."""
    info = np.finfo(values.dtype)
    unsigned = np.dtype(f"u{values.itemsize}")
    bits = values.view(unsigned) & np.array(np.iinfo(unsigned).max >> 1, unsigned)
    fields = (bits >> np.array(info.nmant, unsigned)).astype(np.intp)
    by_field = np.bincount(fields, minlength=1 << (8 * values.itemsize - 1 - info.nmant))
    zeros = values.size - np.count_nonzero(bits)
    normal = Histogram.from_counts(
        int(info.minexp),
        by_field[1:-1].tolist(),
        zeros=zeros,
        nonfinite=by_field[-1],
        largest=_largest_normal(bits, fields, by_field, values.dtype),
    )
    if by_field[0] == zeros:
        return normal
    subnormal = bits[(fields == 0) & (bits != 0)].view(values.dtype).astype(np.float64)
    exponents = np.frexp(subnormal)[1] - 1
    lowest = int(exponents.min())
    counts = np.bincount(exponents - lowest).tolist()
    return normal.merged(
        Histogram.from_counts(lowest, counts, zeros=0, nonfinite=0, largest=float(subnormal.max()))
    )


def _largest_normal(bits: Any, fields: Any, by_field: Any, dtype: Any) -> float:
    if not by_field[1:-1].any():
        return 0.0
    if by_field[-1]:
        bits = bits[fields < by_field.size - 1]
    return float(bits.max().view(dtype))
