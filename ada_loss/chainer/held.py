"""What a parameter holds: a scaled gradient, with the rest of a loss scale that is no power of two."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ada_loss.arrays.library import cast
from ada_loss.chainer.gradient import ScaledGradient, add, shifted


class Carried(NamedTuple):
    """What a gradient is multiplied by: `factor`, in [1, 2), times 2**`exponent`."""

    factor: float = 1.0
    exponent: int = 0

    @classmethod
    def of(cls, loss_scale: float, exponent: int = 0) -> Carried:
        """A loss scale and an exponent besides it."""
        half, own = math.frexp(loss_scale)
        return cls(2 * half, own - 1 + exponent)


TRUE = Carried()
"""What a true gradient carries: nothing."""


class Held(NamedTuple):
    """A scaled gradient that carries `factor`, in [1, 2), besides its exponent.

    shown: whether code has its array that may change it in place; nobody modifies it otherwise.
    """

    gradient: ScaledGradient
    factor: float = 1.0
    shown: bool = False

    @classmethod
    def of(cls, array: Any, carried: Carried, *, shown: bool = False) -> Held:
        """An array that carries something."""
        return cls(ScaledGradient(array, carried.exponent), carried.factor, shown)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.gradient.array.dtype

    @property
    def carried(self) -> Carried:
        return Carried(self.factor, self.gradient.exponent)

    def true(self) -> Any:
        """The true gradient as a new array of at least float32."""
        return self.carrying(TRUE)

    def carrying(self, carried: Carried) -> Any:
        """The true gradient times what is to be carried, as a new array of at least float32."""
        array, exponent = self.gradient
        wide = shifted(array, carried.exponent - exponent, np.promote_types(array.dtype, np.float32))
        if self.factor != carried.factor:
            return wide / wide.dtype.type(self.factor / carried.factor)
        return wide.copy() if wide is array else wide

    def plus(self, other: Held) -> Held:
        """The sum in at least float32; without any scale where the two carry different factors."""
        if self.factor != other.factor:
            return Held(ScaledGradient(self.true())).plus(Held(ScaledGradient(other.true())))
        wide = np.promote_types(np.promote_types(self.dtype, other.dtype), np.float32)
        parts = [
            ScaledGradient(cast(array, wide), exponent) for array, exponent in (self.gradient, other.gradient)
        ]
        return Held(add(parts), self.factor)

    def as_finite(self) -> Any:
        """An array that is finite exactly if the true gradient is.

        A scaled gradient may be finite although the true one is not, where it was scaled down.
        """
        room = np.finfo(np.promote_types(self.dtype, np.float32)).maxexp - np.finfo(self.dtype).maxexp
        array, exponent = self.gradient
        if exponent >= -room:
            return array
        largest = abs(array.ravel()).max(initial=0, keepdims=True)
        return self._replace(gradient=ScaledGradient(largest, exponent)).true()
