"""The range of scales that suit a layer: all that is kept of a measurement."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

NOT_WANTED = -(1 << 20)
"""Wanted where no shift would help, and below any other."""


@dataclass(frozen=True, slots=True)
class Range:
    """How far a layer's input gradient gx may be scaled, as shifts of the true gradient.

    Attributes:
        wanted: the shift at which hardly any element underflows; `NOT_WANTED` if there is none.
        safe: the largest shift at which no element overflows.
        max_weight_shift: the largest shift that the weights carry in the format without overflow, also where
            they were measured before the last updates.
        zeros: the share of gy's elements that are zero.
        nothing: whether gx is zero, so that the shifts mean nothing.
        unusable: whether something that was measured is not finite, so that nothing else means anything.
    """

    wanted: int = 0
    safe: int = 0
    max_weight_shift: int = 0
    zeros: float = 0.0
    nothing: bool = False
    unusable: bool = False

    @property
    def decides(self) -> bool:
        """Whether a shift can follow from it."""
        return not (self.nothing or self.unusable)

    def merged(self, other: Range) -> Range:
        """The range of several gradients: as far as the smallest of them wants, if it is safe for all."""
        if self.unusable or other.unusable:
            return UNUSABLE
        zeros = max(self.zeros, other.zeros)
        if self.nothing or other.nothing:
            return replace(other if self.nothing else self, zeros=zeros)
        return Range(
            max(self.wanted, other.wanted),
            min(self.safe, other.safe),
            min(self.max_weight_shift, other.max_weight_shift),
            zeros,
        )

    def remembering(self, known: Range | None) -> Range:
        """What to go by from now on: where there was nothing to scale, what was known before."""
        if not self.nothing or known is None or known.nothing:
            return self
        return replace(known, zeros=self.zeros)

    def to_state(self) -> list[Any]:
        """Every field, for a snapshot."""
        return list(astuple(self))


NOTHING = Range(nothing=True)
"""The range of zeros."""

UNUSABLE = Range(unusable=True)
"""The range of what is not finite."""
