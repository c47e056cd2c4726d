"""`fixed`: no layer scales anything; there is only the entry scale."""

from __future__ import annotations

from ada_loss.core.maths import Maths
from ada_loss.core.measurement import Measurement
from ada_loss.core.range import Range
from ada_loss.core.rules.rule import Extremes, Rule, Settings


def _extremes(settings: Settings, measurement: Measurement, maths: Maths) -> Extremes:
    return Extremes(0.0, 0.0)


def _choose(settings: Settings, found: Range, carried: int) -> int:
    return 0


FIXED = Rule("fixed", _extremes, _choose, measures=False)
"""Shift 0 everywhere, whatever the gradients."""
