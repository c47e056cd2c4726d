"""What the paper's rules share: they scale up until hardly any element underflows, within bounds.

Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision Training" (arXiv 1910.12385).
"""

from __future__ import annotations

from typing import Any

from ada_loss.core.maths import floor_log2
from ada_loss.core.measurement import Measurement
from ada_loss.core.range import Range
from ada_loss.core.rules.rule import Settings


def choose_within_bounds(settings: Settings, found: Range, carried: int) -> int:
    """The shift that is wanted, at least 0, as far as it is safe and the settings allow.

    The bounds make it negative where a sum could overflow without, or where `carried` alone is beyond
    `accum_upper_bound`.
    """
    shift = min(max(found.wanted - carried, 0), found.safe - carried)
    if settings.scale_upper_bound is not None:
        shift = min(shift, floor_log2(settings.scale_upper_bound))
    if settings.accum_upper_bound is not None:
        shift = min(shift, floor_log2(settings.accum_upper_bound) - carried)
    return shift


def largest_sum(measurement: Measurement) -> Any:
    """What an element of gx reaches if all of its terms are the largest: fan * max|gy| * max|W|."""
    return measurement.fan * measurement.largest_term
