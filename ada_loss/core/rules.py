"""Which shift a layer adds: the rules, as pure functions of statistics.

A layer computes its input gradient gx as sums of products of its output gradient gy and its weights W. What
was measured of them gives the `Range` of scales that suit it, and of these `choose_shift` takes one; the
layer's own scale is 2**shift. `approx_range`, `abs_range` and `element_wise_range` follow Zhao, Vogel, Ahmed,
"Adaptive Loss Scaling for Mixed Precision Training" (arXiv 1910.12385): scale until hardly any element
underflows, but never so far that one could overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

from ada_loss.core.config import METHODS, AdaLossConfig
from ada_loss.core.formats import FLOAT16
from ada_loss.core.measurement import Measurement

__all__ = ["METHODS", "Range", "choose_shift", "find_range", "floor_log2"]

_LARGEST, _SMALLEST = FLOAT16.max, FLOAT16.smallest_subnormal

AUTO_HEADROOM, AUTO_CAST_HEADROOM = 8, 4
"""How many powers of two `auto` keeps between the peak that it expects and the largest float16: of a product
and of a cast, whose peak it knows.

Found with benchmarks/fidelity.py: with 10 for products, or 8 for casts, single elements of very skewed
gradients underflow; with less, sums in float16 between two layers overflow more often, and are computed
again. The signal-to-noise ratio is the same from 0 to 18.
"""

AUTO_DEVIATIONS = 8.0
"""How many standard deviations above its largest term a sum of products is expected to reach at most."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a rule makes of a measurement, and all that is kept of one: how far gx may be scaled.

    wanted: the shift at which hardly any element underflows; -inf where none would help. safe: the largest at
        which none overflows; inf where gx is zero, -inf where a measured array is not finite. Both are of
        the true gradient, and integers where they are finite.
    zeros: the share of gy's elements that are zero.
    room: the largest shift that float16 weights carry without overflow, also where they were measured before
        the last updates.
    """

    wanted: float = -math.inf
    safe: float = math.inf
    zeros: float = 0.0
    room: float = math.inf

    @property
    def finite(self) -> bool:
        """Whether every element was that was measured."""
        return self.safe > -math.inf

    def merged(self, other: Range) -> Range:
        """The range of several gradients: as far as the smallest of them wants, if it is safe for all."""
        return Range(
            max(self.wanted, other.wanted),
            min(self.safe, other.safe),
            max(self.zeros, other.zeros),
            min(self.room, other.room),
        )

    def remembering(self, known: Range | None) -> Range:
        """What to go by from now on: where there was nothing to scale, what was known before."""
        if known is None or self.safe < math.inf or known.safe == math.inf:
            return self
        return replace(known, zeros=self.zeros)


ANY = Range()
"""The range of nothing at all."""


def find_range(config: AdaLossConfig, exponent: int, measurement: Measurement) -> Range:
    """The range of a layer whose measured gradient carries `exponent`.

    Of what is not finite the figures mean nothing, and where every product is zero there is nothing to scale.
    """
    method, gradient, factor = config.loss_scale_method, measurement.gradient, measurement.factor
    if method == "fixed":
        return ANY
    if not (gradient.finite and factor.finite):
        return Range(safe=-math.inf)
    zeros = 1 - gradient.nonzero / gradient.size if gradient.nonzero < gradient.size else 0.0
    if measurement.zero:
        return Range(zeros=zeros)
    wanted, safe = _RANGES[method](config, measurement)
    return Range(wanted + exponent, safe + exponent, zeros, _shift_to(_LARGEST, factor.largest) - 1)


def choose_shift(config: AdaLossConfig, found: Range, exponent: int, *, backoff: int = 0) -> int:
    """The shift, log2 of the layer's scale, for a gradient that arrives with `exponent`.

    backoff: by how many powers of two everything in flight has been lowered because of overflows; the rules
        choose as they would for gradients as much larger, since they would otherwise undo it at once.

    0 where there is nothing to choose from: every product is zero, or something is not finite. The bounds
    hold for the paper's rules: they make the shift negative where a sum could overflow without, or where
    `exponent` alone is beyond `accum_upper_bound`.
    """
    if math.isinf(found.safe):
        return 0
    carried = exponent + backoff
    if config.loss_scale_method == "auto":
        return int(found.safe) - carried
    shift = int(min(max(found.wanted - carried, 0), found.safe - carried))
    if config.scale_upper_bound is not None:
        shift = min(shift, floor_log2(config.scale_upper_bound))
    if config.accum_upper_bound is not None:
        shift = min(shift, floor_log2(config.accum_upper_bound) - carried)
    return shift


def floor_log2(value: float) -> int:
    """The exponent of the largest power of two that is at most `value`, a positive number."""
    return math.frexp(value)[1] - 1


def _range_for_share(config: AdaLossConfig, measurement: Measurement) -> tuple[float, float]:
    """`approx_range`: the scale at which a share `n_uf` of the elements lies below the smallest float16,
    taking them for normal around zero, or at a cast, if so configured, for log-normal."""
    gradient = measurement.gradient
    if measurement.cast and config.cast_distribution == "log_normal":
        mean, deviation = gradient.log_moments
        low = math.exp(mean + deviation * _normal_quantile(config.n_uf))
    else:
        terms = 1 if measurement.cast else measurement.fan / 2  # ReLU zeroes half of them
        sigma = math.sqrt(gradient.mean_square * measurement.factor.mean_square * terms)
        # The normal quantile at (1 + p) / 2 is sqrt(2) * erfinv(p).
        low = _normal_quantile((1 + config.n_uf) / 2) * sigma
    return _shift_for_smallest(low), _safe_shift(measurement)


def _range_for_smallest(config: AdaLossConfig, measurement: Measurement) -> tuple[float, float]:
    """`abs_range`, `element_wise_range`: the scale at which the smallest product is the smallest float16."""
    return _shift_for_smallest(measurement.smallest_term), _safe_shift(measurement)


def _range_of_peak(config: AdaLossConfig, measurement: Measurement) -> tuple[float, float]:
    """`auto`: the scale that brings the peak which gx may reach to a fixed distance below the largest
    float16, up or down."""
    fan, term = measurement.fan, measurement.largest_term
    deviation = math.sqrt(measurement.gradient.mean_square * measurement.factor.mean_square * fan)
    peak = min(fan * term, term + AUTO_DEVIATIONS * deviation)
    shift = _shift_to(_LARGEST, peak) - (AUTO_CAST_HEADROOM if measurement.cast else AUTO_HEADROOM)
    return shift, shift


_RANGES: dict[str, Callable[[AdaLossConfig, Measurement], tuple[float, float]]] = {
    "approx_range": _range_for_share,
    "abs_range": _range_for_smallest,
    "element_wise_range": _range_for_smallest,
    "auto": _range_of_peak,
}
"""What each rule makes of a measurement that is finite and not zero: `Range.wanted` and `Range.safe` of the
measured gradient."""


def _shift_for_smallest(magnitude: float) -> float:
    """The shift that brings a magnitude to the smallest float16, rounded down; none if it is so small that
    not even float64 holds it."""
    return _shift_to(_SMALLEST, magnitude) if magnitude else -math.inf


def _safe_shift(measurement: Measurement) -> float:
    """The largest shift at which no sum overflows, even if all of its terms are the largest."""
    return _shift_to(_LARGEST, measurement.fan * measurement.largest_term)


def _shift_to(target: float, magnitude: float) -> float:
    """The largest shift that leaves a magnitude at or below `target`; inf or -inf if it is beyond float64's
    range."""
    scale = target / magnitude if magnitude else math.inf
    return floor_log2(scale) if 0 < scale < math.inf else math.copysign(math.inf, scale - 1)


@functools.cache
def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
