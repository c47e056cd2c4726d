"""`abs_range`: the paper's rule by extremes, which keeps the smallest product that could be there."""

from __future__ import annotations

from ada_loss.core.maths import Maths
from ada_loss.core.measurement import Measurement, Needs
from ada_loss.core.rules.paper import choose_within_bounds, largest_sum
from ada_loss.core.rules.rule import Extremes, Rule, Settings


def _needs(settings: Settings, is_cast: bool) -> Needs:
    return Needs(amin=True)


def extremes_of_terms(settings: Settings, measurement: Measurement, maths: Maths) -> Extremes:
    """The smallest product, and the sum of as many of the largest as there may be in one."""
    return Extremes(measurement.smallest_term, largest_sum(measurement))


ABS_RANGE = Rule("abs_range", extremes_of_terms, choose_within_bounds, _needs, bounded=True)
"""min(u_min / (min|gy| * min|W|), u_max / (fan * max|gy| * max|W|)), over elements that are not zero."""
