"""The scale with which gradients enter a scope, and how it answers overflow: one mechanism for every
method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.formats import FLOAT16, FloatFormat

PATIENCE = 8
"""How many steps in a row may overflow at the smallest scale before the run counts as diverged.

Where no scale helps, each of those steps stands for one power of two that there still is as well.
"""

RECOVERY_INTERVAL = 1000
"""After how many good steps a scale that backed off without being dynamic takes one step back up."""


_SETTINGS = ("interval", "number_format")


@dataclass(frozen=True, repr=False)
class EntryScale:
    """The entry scale 2**exponent and what decides its next value; `after` makes the next one.

    A step whose gradients are not all finite halves the scale, unless no scale can help it, as where the loss
    is not a number: a bad batch says nothing of the scale. `interval` good steps in a row double it, and
    before the first overflow every good step does (Chainer's dynamic rule); without an interval the scale
    only recovers, slowly, towards its initial value.

    initial, interval: settings. good_steps: good ones since the scale last changed. overflows: how many in a
    row, up to the last step, were not finite and did not lower the scale. skipped: steps that were not finite
    so far. number_format: the format that gradients are kept in. Its smallest power of two is the smallest
    scale, its largest the one at which dynamic scaling stops growing.
    """

    initial: int = 0
    interval: int | None = None
    exponent: int = 0
    good_steps: int = 0
    overflows: int = 0
    skipped: int = 0
    number_format: FloatFormat = FLOAT16

    @classmethod
    def from_config(cls, config: AdaLossConfig, number_format: FloatFormat = FLOAT16) -> EntryScale:
        """The entry scale at the beginning of training."""
        exponent = config.init_exponent
        return cls(exponent, config.dynamic_interval, exponent, number_format=number_format)

    @property
    def scale(self) -> float:
        return 2.0**self.exponent

    @property
    def backoff(self) -> int:
        """By how many powers of two the scale is below its initial value because of overflows."""
        return max(0, self.initial - self.exponent)

    @property
    def diverged(self) -> bool:
        """Whether steps keep overflowing although the scale cannot be lowered any more, or would not help."""
        return self.overflows >= PATIENCE + self.exponent - self._lowest

    def __repr__(self) -> str:
        steps = "1 step" if self.skipped == 1 else f"{self.skipped} steps"
        return f"EntryScale(2**{self.exponent} = {self.scale:g}, {steps} skipped, {self._state})"

    def after(self, *, finite: bool, scale_helps: bool = True) -> EntryScale:
        """The entry scale after a step.

        Args:
            finite: whether its gradients were all finite.
            scale_helps: of one whose were not, whether a smaller scale might have made them so.
        """
        if not finite:
            exponent = max(self._lowest, self.exponent - 1) if scale_helps else self.exponent
            lowered = exponent < self.exponent
            return replace(
                self,
                exponent=exponent,
                good_steps=0 if scale_helps else self.good_steps,
                overflows=self.overflows + (not lowered),
                skipped=self.skipped + 1,
            )
        steps = replace(self, good_steps=self.good_steps + 1, overflows=0)
        if self.exponent >= self._ceiling or steps.good_steps < self._growth_interval:
            return steps
        return replace(steps, exponent=self.exponent + 1, good_steps=0)

    def to_state(self) -> dict[str, Any]:
        """Every field but those that are up to the script that resumes, for a snapshot."""
        return {name: value for name, value in vars(self).items() if name not in _SETTINGS}

    def restored(self, state: dict[str, Any]) -> EntryScale:
        """This scale, with these settings, where `to_state` was taken; back at its initial value if that was
        another one there, whose growth or back-off says nothing of this one."""
        if state["initial"] != self.initial:
            return replace(self, skipped=state["skipped"])
        return replace(self, **state)

    @property
    def _state(self) -> str:
        if self.diverged:
            return "diverged"
        if self.backoff:
            return f"backed off from 2**{self.initial}"
        return "as set" if self.interval is None else "dynamic"

    @property
    def _lowest(self) -> int:
        return min(self.number_format.min_exponent, self.initial)

    @property
    def _ceiling(self) -> int:
        return self.initial if self.interval is None else max(self.number_format.max_exponent, self.initial)

    @property
    def _growth_interval(self) -> int:
        if self.interval is None:
            return RECOVERY_INTERVAL
        return self.interval if self.skipped else 1
