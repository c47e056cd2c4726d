"""The few functions that formulas of rules need beside `+`, `-`, `*` and `/`, and integer maths of exponents.

A rule's formula takes the functions as an argument, so that it is written once: with `PYTHON` it works on
numbers, with those of a library of arrays on arrays that stay on a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Maths:
    """Functions of numbers, or of arrays that stand for numbers.

    Attributes:
        sqrt: the square root.
        exp: e to this power.
        minimum: the smaller of two.
        maximum: the larger of two.
    """

    sqrt: Callable[[Any], Any]
    exp: Callable[[Any], Any]
    minimum: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]


PYTHON = Maths(math.sqrt, math.exp, min, max)
"""For Python's numbers."""


def floor_log2(value: float) -> int:
    """The exponent of the largest power of two that is at most `value`, a positive number."""
    return math.frexp(value)[1] - 1


def shift_to(target: float, magnitude: float) -> int:
    """The largest shift that leaves a magnitude at or below `target`; both are positive and finite."""
    # The quotient itself may be beyond the range of a float.
    (part, exponent), (other, others_exponent) = math.frexp(target), math.frexp(magnitude)
    return floor_log2(part / other) + exponent - others_exponent
