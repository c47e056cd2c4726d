"""What a rule is: two formulas, and what they have to know."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

from ada_loss.core.formats import FloatFormat
from ada_loss.core.maths import PYTHON, Maths, shift_to
from ada_loss.core.measurement import Measurement, Needs
from ada_loss.core.range import NOT_WANTED, UNUSABLE, Range


class Settings(Protocol):
    """The settings that rules look at; see `AdaLossConfig`."""

    @property
    def scale_upper_bound(self) -> float | None: ...
    @property
    def accum_upper_bound(self) -> float | None: ...
    @property
    def n_uf(self) -> float: ...
    @property
    def cast_distribution(self) -> str: ...


class Extremes(NamedTuple):
    """The magnitudes by which a rule goes.

    Attributes:
        low: what is to reach the smallest number of the format, so that hardly any element underflows.
        high: what must not exceed the largest number, so that none overflows.
    """

    low: Any
    high: Any


def _nothing_more(settings: Settings, is_cast: bool) -> Needs:
    return Needs()


@dataclass(frozen=True)
class Rule:
    """A way to choose the scales of layers.

    A layer computes its input gradient gx as sums of products of its output gradient gy and its weights W.
    What is measured of them gives two magnitudes, these give the shifts that are wanted and safe in a format,
    and of these the rule takes one; the layer's own scale is 2**shift.

    Attributes:
        name: what users call it.
        extremes: (settings, measurement, maths) -> Extremes, for a measurement that is finite and not zero.
            It is written in terms of a `Maths`, so that it serves numbers and arrays alike.
        choose: (settings, range, carried) -> shift, for a gradient that carries the exponent `carried`
            already, from the range of the true gradient.
        needs: (settings, is_cast) -> Needs.
        measures: whether anything has to be known at all.
        scales_sums: whether gradients that add up others, over a batch or over positions, get scales of their
            own, and do not overflow, as those of weights; in the paper they share that of what they are
            computed from.
        bounded: whether it looks at `n_uf` and the two bounds, as those of the paper do.
    """

    name: str
    extremes: Callable[[Settings, Measurement, Maths], Extremes] = field(repr=False)
    choose: Callable[[Settings, Range, int], int] = field(repr=False)
    needs: Callable[[Settings, bool], Needs] = field(default=_nothing_more, repr=False)
    measures: bool = True
    scales_sums: bool = False
    bounded: bool = False

    def range(
        self, settings: Settings, number_format: FloatFormat, measurement: Measurement, exponent: int = 0
    ) -> Range:
        """The range of a layer whose measured gradient carries `exponent`, in a format.

        Where every product is zero there is nothing to scale, and of what is not finite nothing is known.
        """
        zeros = measurement.gradient.zeros
        if not measurement.finite:
            return UNUSABLE
        if measurement.zero:
            return Range(zeros=zeros, nothing=True)
        low, high = self.extremes(settings, measurement, PYTHON)
        if not math.isfinite(high):
            return UNUSABLE
        return Range(
            # What is so small that not even a float holds it is not to be had.
            wanted=exponent + shift_to(number_format.smallest_subnormal, low) if low else NOT_WANTED,
            safe=exponent + shift_to(number_format.max, high),
            # One power of two is kept, because weights change between measurements.
            max_weight_shift=shift_to(number_format.max, measurement.factor.amax) - 1,
            zeros=zeros,
        )

    def shift(self, settings: Settings, found: Range, exponent: int, *, backoff: int = 0) -> int:
        """The shift, log2 of the layer's scale, for a gradient that arrives with `exponent`.

        Args:
            settings: those of the layer.
            found: its range.
            exponent: what the gradient carries.
            backoff: by how many powers of two everything on the way has been lowered because of overflows.
                Rules choose as they would for gradients as much larger, since they would otherwise undo it at
                once.

        Returns:
            The shift; 0 where there is nothing to choose from.
        """
        if not found.decides:
            return 0
        return self.choose(settings, found, exponent + backoff)


@functools.cache
def normal_quantile(probability: float) -> float:
    """What a standard normal number lies below with this probability."""
    return NormalDist().inv_cdf(probability)
