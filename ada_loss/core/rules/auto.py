"""`auto`: brings the largest value that a gradient is likely to reach to a fixed place in the format."""

from __future__ import annotations

from typing import Any

from ada_loss.core.maths import Maths
from ada_loss.core.measurement import Measurement
from ada_loss.core.range import Range
from ada_loss.core.rules.rule import Extremes, Rule, Settings

HEADROOM, CAST_HEADROOM = 8, 4
"""How many powers of two lie between the amax that is expected and the largest number of the format: of a
product and of a cast, whose amax is known.

Found for float16 with benchmarks/fidelity.py: with 10 for products, or 8 for casts, single elements of very
skewed gradients underflow; with less, sums in float16 between two layers overflow more often, and are
computed again. The signal-to-noise ratio is the same from 0 to 18.
"""

DEVIATIONS = 8.0
"""How many standard deviations above its largest term a sum of products is expected to reach at most."""


def _extremes(settings: Settings, measurement: Measurement, maths: Maths) -> Extremes:
    high = 2.0 ** (CAST_HEADROOM if measurement.is_cast else HEADROOM) * expected_amax(measurement, maths)
    return Extremes(high, high)


def expected_amax(measurement: Measurement, maths: Maths) -> Any:
    """The amax that gx may reach: the largest term and some standard deviations of the sum, at most as much
    as if all terms were the largest."""
    fan, term = measurement.fan, measurement.largest_term
    deviation = maths.sqrt(measurement.gradient.mean_square * measurement.factor.mean_square * fan)
    return maths.minimum(fan * term, term + DEVIATIONS * deviation)


def _choose(settings: Settings, found: Range, carried: int) -> int:
    return found.safe - carried


AUTO = Rule("auto", _extremes, _choose, scales_sums=True)
"""2^-8 * u_max / min(fan * t, t + 8 * sqrt(E[gy^2] * E[W^2] * fan)) with t = max|gy| * max|W|; at a cast
2^-4 * u_max / max|gy|. Up or down, without bounds."""
