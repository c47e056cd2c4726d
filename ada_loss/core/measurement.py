"""What a rule has to know of a layer before it can choose a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class Statistics(NamedTuple):
    """Statistics of an array; where `finite` is False, the other figures mean nothing.

    A front end whose figures stay on a device may fill in arrays of one element.

    Attributes:
        size: how many elements there are.
        nonzero: how many of them are not zero.
        sum_squares: the sum of the squares.
        amax: the largest magnitude, 0 where every element is zero.
        amin: the smallest nonzero magnitude, 0 where every element is zero; 0 unless asked for.
        finite: whether every element is.
        sum_logs: the sum of ln|x| over the nonzero elements; 0 unless asked for.
        sum_squared_logs: the sum of (ln|x|)^2 over the nonzero elements; 0 unless asked for.
    """

    size: int
    nonzero: int
    sum_squares: float
    amax: float
    amin: float
    finite: bool
    sum_logs: float = 0.0
    sum_squared_logs: float = 0.0

    @property
    def mean_square(self) -> float:
        """E[x^2] over all elements, zeros included."""
        return self.sum_squares / self.size if self.size else 0.0

    @property
    def zeros(self) -> float:
        """The share of the elements that are zero."""
        return 1 - self.nonzero / self.size if self.nonzero < self.size else 0.0


EMPTY = Statistics(0, 0, 0.0, 0.0, 0.0, True)
"""Of no element at all."""

ONE = Statistics(1, 1, 1.0, 1.0, 1.0, True)
"""Of a single one."""

UNUSABLE = Statistics(0, 0, 0.0, 0.0, 0.0, False)
"""Of an array with an element that is not finite."""


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
        amax=max((part.amax for part in parts), default=0.0),
        amin=min((part.amin for part in parts if part.nonzero), default=0.0),
        finite=True,
        sum_logs=sum(part.sum_logs for part in parts),
        sum_squared_logs=sum(part.sum_squared_logs for part in parts),
    )


@dataclass(frozen=True)
class Factor:
    """What a layer multiplies its output gradient gy by.

    Attributes:
        weight: an array of any float type.
        fan: how many products are summed for one element of the input gradient at most: out_channels * kh *
            kw of a convolution, out_features of a linear layer.
        channel_axis: the axis of `weight` that runs over gy's channels (1 in a deconvolution). None where the
            two share no channels (a matrix product of activations): any element of gy may then meet any of
            `weight`.
        is_parameter: whether `weight` is the array of a parameter, which is the same for a whole step.
    """

    weight: Any
    fan: int
    channel_axis: int | None = 0
    is_parameter: bool = False


@dataclass(frozen=True)
class Needs:
    """What a rule wants to know of a layer beside amax and mean square.

    Attributes:
        amin: the smallest nonzero magnitudes.
        logs: the moments of ln|gy|.
        products: the extremes of the products of elements that share a channel.
    """

    amin: bool = False
    logs: bool = False
    products: bool = False


class Measurement(NamedTuple):
    """What a rule knows of a layer.

    Attributes:
        gradient: statistics of the output gradient gy.
        weight: statistics of the weight W; None at a cast, which multiplies gy by nothing.
        fan: how many products are summed for one element of the input gradient gx at most.
        products: where measured, the smallest nonzero and the largest magnitude of an element of gy times a
            weight that it meets.
    """

    gradient: Statistics
    weight: Statistics | None = None
    fan: int = 1
    products: tuple[float, float] | None = None

    @property
    def is_cast(self) -> bool:
        """Whether a gradient is only cast."""
        return self.weight is None

    @property
    def factor(self) -> Statistics:
        """Statistics of what gy is multiplied by."""
        return ONE if self.weight is None else self.weight

    @property
    def finite(self) -> bool:
        """Whether every element that was looked at is finite, and so is every product."""
        return self.gradient.finite and self.factor.finite and math.isfinite(self.largest_term)

    @property
    def zero(self) -> bool:
        """Whether gx is zero because every product is."""
        return self.largest_term == 0

    @property
    def smallest_term(self) -> float:
        """The smallest that a nonzero product of an element of gy and a weight can be."""
        return self.gradient.amin * self.factor.amin if self.products is None else self.products[0]

    @property
    def largest_term(self) -> float:
        """The largest that a product of an element of gy and a weight can be."""
        return self.gradient.amax * self.factor.amax if self.products is None else self.products[1]


UNMEASURED = Measurement(EMPTY)
"""What a rule knows that asks nothing."""
