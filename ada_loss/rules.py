"""Which shift a layer adds: the rules, as pure functions of statistics.

A layer computes its input gradient gx as sums of products of its output gradient gy and its weights W. `measure`
reads the arrays, `choose_shift` decides; the layer's own scale is 2**shift. `approx_range`, `abs_range` and
`element_wise_range` follow Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision Training"
(arXiv 1910.12385): scale until hardly any element underflows, but never so far that one could overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ada_loss.config import METHODS, AdaLossConfig
from ada_loss.formats import FLOAT16
from ada_loss.statistics import NOTHING, Statistics, channel_extremes, summarize

__all__ = ["METHODS", "Measurement", "choose_shift", "measure"]

AUTO_HEADROOM = 10
"""How many powers of two `auto` keeps between the peak that it expects and the largest float16."""

AUTO_DEVIATIONS = 8.0
"""How many standard deviations above its largest term a sum of products is expected to reach at most."""


@dataclass(frozen=True)
class Measurement:
    """What a rule knows of a layer, in Python numbers.

    gradient: statistics of gy.
    weight: statistics of W, None at a cast.
    fan: how many products are summed for one element of gx at most.
    products: smallest nonzero and largest magnitude of the products of an element of gy and a weight that meets it.
    """

    gradient: Statistics
    weight: Statistics | None = None
    fan: int = 1
    products: tuple[float, float] = (0.0, 0.0)

    @property
    def finite(self) -> bool:
        """Whether every element of gy and W is."""
        return self.gradient.finite and (self.weight is None or self.weight.finite)

    @property
    def zero(self) -> bool:
        """Whether gx is zero because all of gy or all of W is."""
        return not self.gradient.nonzero or (self.weight is not None and not self.weight.nonzero)


def measure(config: AdaLossConfig, gy: Any, weight: Any, fan: int, *, channel_axis: int = 0) -> Measurement:
    """What the configured rule needs to know of a layer.

    gy: the layer's output gradient, channels (or features) along axis 1, a NumPy or CuPy array of any float type.
    weight: the layer's weight, of the same module; None where a gradient is cast to float16.
    fan: products in one sum, out_channels * kh * kw of a convolution, out_features of a linear layer, 1 at a cast.
    channel_axis: the axis of `weight` that runs over gy's channels (1 in a deconvolution); only
        `element_wise_range` looks at it.
    """
    method = config.loss_scale_method
    if method == "fixed":
        return Measurement(NOTHING)
    if weight is None:
        return Measurement(summarize(gy, logs=config.cast_distribution == "log_normal"))
    measurement = Measurement(summarize(gy), summarize(weight), fan)
    if method != "element_wise_range" or measurement.zero or not measurement.finite:
        return measurement
    return Measurement(measurement.gradient, measurement.weight, fan, _product_extremes(gy, weight, channel_axis))


def choose_shift(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    """The shift, log2 of the layer's scale, for a gradient that arrives with `exponent`; 0 where there is nothing to
    choose from: all zero, or not finite."""
    if measurement.zero or not measurement.finite:
        return 0
    return _RULES[config.loss_scale_method](config, measurement, exponent)


def _fixed(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    return 0


def _auto(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    """Bring the peak that gx may reach to a fixed distance below the largest float16, up or down."""
    gradient, weight, fan = measurement.gradient, measurement.weight, measurement.fan
    if weight is None:
        peak = gradient.largest
    else:
        term = gradient.largest * weight.largest
        deviation = math.sqrt(gradient.mean_square * weight.mean_square * fan)
        peak = min(fan * term, term + AUTO_DEVIATIONS * deviation)
    return floor_log2(FLOAT16.max / peak) - AUTO_HEADROOM


def _approx_range(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    """So far that about a share n_uf of the elements underflows, taking them for normal around zero; at a cast also
    for log-normal."""
    gradient, weight = measurement.gradient, measurement.weight
    if weight is not None:
        # ReLU zeroes half of the terms.
        sigma = math.sqrt(gradient.mean_square * weight.mean_square * measurement.fan / 2)
    elif config.cast_distribution == "log_normal":
        mean, deviation = gradient.log_moments
        lower = math.exp(math.log(FLOAT16.smallest_subnormal) - mean - deviation * NormalDist().inv_cdf(config.n_uf))
        return _within_bounds(config, measurement, exponent, lower)
    else:
        sigma = math.sqrt(gradient.mean_square)
    # sqrt(2) * erfinv(p) is the normal quantile at (1 + p) / 2.
    lower = FLOAT16.smallest_subnormal / (NormalDist().inv_cdf((1 + config.n_uf) / 2) * sigma)
    return _within_bounds(config, measurement, exponent, lower)


def _abs_range(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    """So far that the product of the smallest gradient and the smallest weight does not underflow."""
    smallest = measurement.gradient.smallest * (measurement.weight.smallest if measurement.weight else 1.0)
    return _within_bounds(config, measurement, exponent, FLOAT16.smallest_subnormal / smallest)


def _element_wise_range(config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
    """So far that no product of a gradient and a weight that it meets underflows."""
    smallest, largest = measurement.products
    if measurement.weight is None:
        return _abs_range(config, measurement, exponent)
    if not largest:
        return 0
    return _within_bounds(config, measurement, exponent, FLOAT16.smallest_subnormal / smallest, largest)


_RULES: dict[str, Callable[[AdaLossConfig, Measurement, int], int]] = {
    "fixed": _fixed,
    "approx_range": _approx_range,
    "abs_range": _abs_range,
    "element_wise_range": _element_wise_range,
    "auto": _auto,
}


def _within_bounds(
    config: AdaLossConfig, measurement: Measurement, exponent: int, lower: float, largest: float | None = None
) -> int:
    """log2 of the scale that a paper's rule wants, at least 1, kept from overflow and within the bounds."""
    if largest is None:
        largest = measurement.gradient.largest * (measurement.weight.largest if measurement.weight else 1.0)
    upper = FLOAT16.max / (measurement.fan * largest)
    scale = min(max(lower, 1.0), upper, config.scale_upper_bound or math.inf)
    shift = floor_log2(scale)
    if config.accum_upper_bound is None:
        return shift
    return min(shift, floor_log2(config.accum_upper_bound) - exponent)


def floor_log2(value: float) -> int:
    """The exponent of the largest power of two that is at most `value`, a positive number."""
    return math.frexp(value)[1] - 1


def _product_extremes(gy: Any, weight: Any, channel_axis: int) -> tuple[float, float]:
    """Smallest nonzero and largest |gy * W| over every pair that shares a channel."""
    smallest, largest = 0.0, 0.0
    pairs = zip(channel_extremes(gy, 1), channel_extremes(weight, channel_axis), strict=True)
    for (gy_low, gy_high), (weight_low, weight_high) in pairs:
        if gy_high and weight_high:
            smallest = min(smallest or math.inf, gy_low * weight_low)
            largest = max(largest, gy_high * weight_high)
    return smallest, largest
