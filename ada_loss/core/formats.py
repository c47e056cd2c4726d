"""Binary floating-point formats: exponent and mantissa bits, from which every range follows."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with subnormals, as IEEE 754 lays it out.

    `infinity` tells whether the largest exponent code is reserved for infinities and NaNs (IEEE 754), or
    carries finite numbers up to one last code, the NaN (E4M3 of the Open Compute Project's 8-bit formats).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinity: bool = True

    @property
    def bias(self) -> int:
        """What the stored exponent exceeds the real one by."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest finite number."""
        if self.infinity:
            return math.ldexp(2 - 2.0**-self.mantissa_bits, self.bias)
        return math.ldexp(2 - 2 * 2.0**-self.mantissa_bits, self.bias + 1)

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest power of two."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest power of two."""
        return 1 - self.bias - self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number that has the full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number. Rounding to nearest turns up to half of it into zero."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)


FLOAT32 = FloatFormat("float32", 8, 23)
FLOAT16 = FloatFormat("float16", 5, 10)
BFLOAT16 = FloatFormat("bfloat16", 8, 7)
FLOAT8_E5M2 = FloatFormat("float8_e5m2", 5, 2)
FLOAT8_E4M3 = FloatFormat("float8_e4m3", 4, 3, infinity=False)
