"""Which shift a layer adds: the rules, as pure functions of statistics.

A layer computes its input gradient gx as sums of products of its output gradient gy and its weights W. From
what was measured of them `choose_shift` decides; the layer's own scale is 2**shift. `approx_range`,
`abs_range` and `element_wise_range` follow Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision
Training" (arXiv 1910.12385): scale until hardly any element underflows, but never so far that one could
overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from ada_loss.config import METHODS, AdaLossConfig
from ada_loss.formats import FLOAT16
from ada_loss.measurement import Measurement

__all__ = ["METHODS", "choose_shift", "floor_log2"]

AUTO_HEADROOM, AUTO_CAST_HEADROOM = 8, 4
"""How many powers of two `auto` keeps between the peak that it expects and the largest float16: of a product
and of a cast, whose peak it knows.

Found with benchmarks/fidelity.py: with 10 for products, or 8 for casts, single elements of very skewed
gradients underflow; with less, sums in float16 between two layers overflow more often, and are computed
again. The signal-to-noise ratio is the same from 0 to 18.
"""

AUTO_DEVIATIONS = 8.0
"""How many standard deviations above its largest term a sum of products is expected to reach at most."""


def choose_shift(config: AdaLossConfig, measurement: Measurement, exponent: int, *, backoff: int = 0) -> int:
    """The shift, log2 of the layer's scale, for a gradient that arrives with `exponent`.

    backoff: by how many powers of two everything in flight has been lowered because of overflows; the rules
        choose as they would for gradients as much larger, since they would otherwise undo it at once.

    0 where there is nothing to choose from: every product is zero, or something is not finite. The bounds
    hold for the paper's rules: they make the shift negative where a sum could overflow without, or where
    `exponent` alone is beyond `accum_upper_bound`.
    """
    method = config.loss_scale_method
    if method == "fixed" or measurement.zero or not measurement.finite:
        return 0
    if method == "auto":
        return _auto_shift(measurement) - backoff
    wanted = max(_SUFFICIENT_SCALES[method](config, measurement) * 2.0**-backoff, 1.0)
    safe = FLOAT16.max / (measurement.fan * measurement.largest_term) * 2.0**-backoff
    shift = floor_log2(min(wanted, safe, config.scale_upper_bound or math.inf))
    if config.accum_upper_bound is None:
        return shift
    return min(shift, floor_log2(config.accum_upper_bound) - backoff - exponent)


def floor_log2(value: float) -> int:
    """The exponent of the largest power of two that is at most `value`, a positive number."""
    return math.frexp(value)[1] - 1


def _scale_for_share(config: AdaLossConfig, measurement: Measurement) -> float:
    """`approx_range`: the scale at which a share `n_uf` of the elements lies below the smallest float16,
    taking them for normal around zero, or at a cast, if so configured, for log-normal."""
    gradient = measurement.gradient
    if measurement.cast and config.cast_distribution == "log_normal":
        mean, deviation = gradient.log_moments
        return FLOAT16.smallest_subnormal / math.exp(mean + deviation * NormalDist().inv_cdf(config.n_uf))
    terms = 1 if measurement.cast else measurement.fan / 2  # ReLU zeroes half of them
    sigma = math.sqrt(gradient.mean_square * measurement.factor.mean_square * terms)
    if not sigma:
        return 1.0  # so small that not even float64 holds the squares
    # The normal quantile at (1 + p) / 2 is sqrt(2) * erfinv(p).
    return FLOAT16.smallest_subnormal / (NormalDist().inv_cdf((1 + config.n_uf) / 2) * sigma)


def _scale_for_smallest(config: AdaLossConfig, measurement: Measurement) -> float:
    """`abs_range`, `element_wise_range`: the scale at which the smallest product is the smallest float16."""
    return FLOAT16.smallest_subnormal / measurement.smallest_term


_SUFFICIENT_SCALES: dict[str, Callable[[AdaLossConfig, Measurement], float]] = {
    "approx_range": _scale_for_share,
    "abs_range": _scale_for_smallest,
    "element_wise_range": _scale_for_smallest,
}


def _auto_shift(measurement: Measurement) -> int:
    """Bring the peak that gx may reach to a fixed distance below the largest float16, up or down."""
    fan, term = measurement.fan, measurement.largest_term
    deviation = math.sqrt(measurement.gradient.mean_square * measurement.factor.mean_square * fan)
    peak = min(fan * term, term + AUTO_DEVIATIONS * deviation)
    headroom = AUTO_CAST_HEADROOM if measurement.cast else AUTO_HEADROOM
    return floor_log2(FLOAT16.max / peak) - headroom
