"""The window of a place: the scales at which float16 holds its values, neither too small nor too large."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ada_loss.core.formats import FLOAT16, FloatFormat
from ada_loss.core.histogram import Histogram

MOST_UNDERFLOW = 1e-3
"""The share of the non-zero elements that may underflow at a scale that counts as without underflow."""


@dataclass(frozen=True)
class Window:
    """Exponents k of the scales 2**k that suit: from `lowest`, below which too much underflows, to `highest`,
    above which something overflows. -inf and inf where there is nothing to lose.
    """

    lowest: float = -math.inf
    highest: float = math.inf

    @property
    def empty(self) -> bool:
        """Whether no scale suits."""
        return self.lowest > self.highest

    def __contains__(self, exponent: float) -> bool:
        return self.lowest <= exponent <= self.highest

    def intersection(self, other: Window) -> Window:
        """The scales that suit both."""
        return Window(max(self.lowest, other.lowest), min(self.highest, other.highest))


ANY = Window()
"""The window of values that are all zero."""


def find_window(
    histogram: Histogram, number_format: FloatFormat = FLOAT16, *, most: float = MOST_UNDERFLOW
) -> Window:
    """The scales at which at most the share `most` of the non-zero elements is below the format's smallest
    number, and none above its largest.

    The lower end is exact, since powers of two bound the bins; the upper one is, since the largest magnitude
    is known. What is not finite is not looked at.
    """
    if not histogram.nonzero:
        return ANY
    allowed, below, exponent = most * histogram.nonzero, 0, histogram.lowest
    for count in histogram.counts:
        if below + count > allowed:
            break
        below, exponent = below + count, exponent + 1
    lowest = math.frexp(number_format.smallest_subnormal)[1] - 1 - exponent
    mantissa, top = math.frexp(histogram.largest)
    limit, reach = math.frexp(number_format.max)
    return Window(lowest, reach - top - (mantissa > limit))


def intersect(windows: Iterable[Window]) -> Window:
    """The scales that suit all."""
    common = ANY
    for window in windows:
        common = common.intersection(window)
    return common
