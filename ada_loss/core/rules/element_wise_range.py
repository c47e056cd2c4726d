"""`element_wise_range`: as `abs_range`, by the products of elements that really meet."""

from __future__ import annotations

from ada_loss.core.measurement import Needs
from ada_loss.core.rules.abs_range import extremes_of_terms
from ada_loss.core.rules.paper import choose_within_bounds
from ada_loss.core.rules.rule import Rule, Settings


def _needs(settings: Settings, is_cast: bool) -> Needs:
    return Needs(amin=True, products=True)


ELEMENT_WISE_RANGE = Rule("element_wise_range", extremes_of_terms, choose_within_bounds, _needs, bounded=True)
"""min(u_min / min|gy * W|, u_max / (fan * max|gy * W|)), over pairs that share a channel and are not zero."""
