"""The exponent on which processes agree for a gradient that all of them hold a part of.

They agree by the smallest of the integers that each of them brings, so one all-reduce (MIN) of 32-bit
integers serves any number of gradients. The smallest exponent itself would not do: a process whose gradient
is zero or tiny may bring a small one.
"""

from __future__ import annotations

import math

ABSENT = 2**31 - 1
"""Stands for the exponent of a gradient that a process does not have."""

ZERO = ABSENT - 1
"""Stands for the exponent of a gradient of zeros: any will do."""


OVERFLOW = -(2**31)
"""Stands for the exponent of a gradient that is not finite: none will help."""


def bid(amax: float, limit: float) -> int:
    """What a process brings for a gradient of this amax.

    Returns:
        The largest exponent k with amax * 2**k <= limit; `ZERO` if amax is 0, `OVERFLOW` if it is not finite.
    """
    if amax == 0:
        return ZERO
    return math.frexp(limit / amax)[1] - 1 if math.isfinite(amax) else OVERFLOW


def exponent_of(smallest: int) -> int:
    """The exponent that the smallest bid stands for."""
    return smallest if OVERFLOW < smallest < ZERO else 0


def scaled_bids(amax: float, limit: float, exponent: int) -> tuple[int, int]:
    """What a process brings for a scaled gradient: two integers, each to be reduced by itself."""
    if not amax:
        return ZERO, ZERO
    return exponent + exponent_of(bid(amax, limit)), -exponent


def scaled_exponent(smallest: int, smallest_negated: int) -> int:
    """The largest exponent that anybody's scaled gradient carries at which none overflows."""
    return 0 if smallest == ZERO else min(smallest, -smallest_negated)
