"""`approx_range`: the paper's rule by moments, which lets a share `n_uf` of the elements underflow."""

from __future__ import annotations

from typing import Any

from ada_loss.core.maths import Maths
from ada_loss.core.measurement import Measurement, Needs
from ada_loss.core.rules.paper import choose_within_bounds, largest_sum
from ada_loss.core.rules.rule import Extremes, Rule, Settings, normal_quantile


def _follows_logarithms(settings: Settings, is_cast: bool) -> bool:
    return is_cast and settings.cast_distribution == "log_normal"


def _needs(settings: Settings, is_cast: bool) -> Needs:
    return Needs(logs=_follows_logarithms(settings, is_cast))


def _extremes(settings: Settings, measurement: Measurement, maths: Maths) -> Extremes:
    follows_logarithms = _follows_logarithms(settings, measurement.is_cast)
    quantile = _log_normal_quantile if follows_logarithms else _normal_quantile
    return Extremes(quantile(settings.n_uf, measurement, maths), largest_sum(measurement))


def _normal_quantile(share: float, measurement: Measurement, maths: Maths) -> Any:
    """The magnitude that a share of gx's elements lies below, taking them for normal around zero:

    sqrt(2) * erfinv(share) * sigma with sigma^2 = E[gy^2] * E[W^2] * fan / 2, as ReLU zeroes half of the
    terms; at a cast sigma^2 = E[gy^2].
    """
    terms = 1 if measurement.is_cast else measurement.fan / 2
    variance = measurement.gradient.mean_square * measurement.factor.mean_square * terms
    # The normal quantile at (1 + p) / 2 is sqrt(2) * erfinv(p).
    return normal_quantile((1 + share) / 2) * maths.sqrt(variance)


def _log_normal_quantile(share: float, measurement: Measurement, maths: Maths) -> Any:
    """The magnitude that a share of gy's nonzero elements lies below, taking their logarithms for normal:

    exp(mu + sqrt(2) * erfinv(2 * share - 1) * s) with the mean mu and the standard deviation s of ln|gy|.
    """
    gradient = measurement.gradient
    mean = gradient.sum_logs / gradient.nonzero
    variance = gradient.sum_squared_logs / gradient.nonzero - mean * mean
    return maths.exp(mean + normal_quantile(share) * maths.sqrt(maths.maximum(variance, 0.0)))


APPROX_RANGE = Rule("approx_range", _extremes, choose_within_bounds, _needs, bounded=True)
"""min(u_min / q, u_max / (fan * max|gy| * max|W|)), where a share `n_uf` of gx lies below q."""
