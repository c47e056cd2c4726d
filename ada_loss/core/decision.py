"""Where a shift is chosen, and what was chosen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ada_loss.core.range import Range
from ada_loss.core.rules import Rule

T = TypeVar("T")


class Site(NamedTuple):
    """Where a shift is chosen.

    Attributes:
        path: the innermost layer that applied the function, as a path below the model, "/" for the model
            itself, or the name given to the function, if it has one.
        call: which of the path's decision points within one step, from 0.
        operand: which input's gradient is scaled; matters for products of two activations.
    """

    path: str
    call: int
    operand: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """A shift as it was last chosen.

    Attributes:
        site: where.
        rule: by which rule.
        exponent: what the gradient that arrived carried.
        shift: what the layer added.
        range: what the rule made of the latest measurement, from which the next shift follows.
    """

    site: Site
    rule: Rule
    exponent: int
    shift: int
    range: Range


class StepMeasurements(NamedTuple):
    """What a process has measured in a step.

    Attributes:
        ranges: by decision point.
        amaxes: of the true gradients that were accumulated, by place and operand.
    """

    ranges: dict[Site, Range]
    amaxes: dict[Site, float]

    def merged(self, other: StepMeasurements) -> StepMeasurements:
        """What both have measured, each site's taken together."""
        return StepMeasurements(
            _union(self.ranges, other.ranges, Range.merged), _union(self.amaxes, other.amaxes, max)
        )


def _union(mine: dict[Site, T], other: dict[Site, T], both: Callable[[T, T], T]) -> dict[Site, T]:
    """The values of both; at sites that both have, what is made of the two."""
    return mine | other | {site: both(mine[site], other[site]) for site in mine.keys() & other.keys()}
