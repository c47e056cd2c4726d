"""The exponent to which gradients are brought before they are added."""

from __future__ import annotations

import math
from collections.abc import Sequence

HEADROOM = 6
"""How many powers of two a sum keeps to the largest number of its format when its exponent is raised."""


def aligned_exponent(
    amaxes: Sequence[float],
    exponents: Sequence[int],
    limit: float,
    *,
    headroom: int = HEADROOM,
    bounded: bool = True,
) -> int:
    """The largest exponent, not above those of the gradients, at which their sum cannot overflow.

    No gradient is raised so far that the sum has less than the headroom left, for sums and factors on the way
    to the next decision point. Zeros may have any exponent.

    Args:
        amaxes: the largest magnitude of each gradient as it is; one that is not finite hinders nothing.
        exponents: what they carry.
        limit: the largest number of the format that the sum is kept in.
        headroom: how many powers of two the sum keeps to `limit`.
        bounded: whether no gradient can hold more than `limit`, whatever is taken for their amaxes.

    Returns:
        The common exponent.
    """
    largest = max(exponents)
    present = [(amax, exponent) for amax, exponent in zip(amaxes, exponents, strict=True) if amax]
    smallest = min((exponent for _, exponent in present), default=largest)
    # At the smallest exponent nothing is scaled up, so Python's own range is enough.
    total = math.fsum(math.ldexp(amax, smallest - exponent) for amax, exponent in present)
    if not total or not math.isfinite(total):
        return largest
    room = -math.frexp(total / limit)[1]
    if bounded:
        room = max(room, -(len(exponents) - 1).bit_length())
    return min(largest, smallest + max(room - headroom, min(room, 0)))
