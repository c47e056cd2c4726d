"""The rules by which a layer's scale is chosen, each an object in a file of its own.

A new rule is a `Rule` in a new file, and its name below.
"""

from ada_loss.core.rules.abs_range import ABS_RANGE
from ada_loss.core.rules.approx_range import APPROX_RANGE
from ada_loss.core.rules.auto import AUTO
from ada_loss.core.rules.element_wise_range import ELEMENT_WISE_RANGE
from ada_loss.core.rules.fixed import FIXED
from ada_loss.core.rules.rule import Extremes, Rule, Settings

RULES = {rule.name: rule for rule in (FIXED, APPROX_RANGE, ABS_RANGE, ELEMENT_WISE_RANGE, AUTO)}
"""The rules by name."""

__all__ = [
    "ABS_RANGE",
    "APPROX_RANGE",
    "AUTO",
    "ELEMENT_WISE_RANGE",
    "FIXED",
    "RULES",
    "Extremes",
    "Rule",
    "Settings",
]
