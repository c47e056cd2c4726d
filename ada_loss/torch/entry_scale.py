"""The entry scale of `ada_loss.core.entry_scale` as tensors, so that a step that overflowed changes it
without anybody waiting for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.entry_scale import RECOVERY_INTERVAL
from ada_loss.core.formats import FLOAT16


@dataclass(frozen=True, eq=False)
class EntryScaleOnDevice:
    """The scale 2**exponent and what decides its next value; `after` makes the next one.

    initial, interval: settings. The others are 0-dim tensors of int32, with the meaning that they have in
    `EntryScale`.
    """

    initial: int
    interval: int | None
    exponent: torch.Tensor
    good_steps: torch.Tensor
    overflows: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def from_config(cls, config: AdaLossConfig, device: torch.device | str = "cpu") -> EntryScaleOnDevice:
        """The entry scale at the beginning of training."""
        zero = torch.zeros((), dtype=torch.int32, device=device)
        initial = config.init_exponent
        return cls(initial, config.dynamic_interval, zero + initial, zero, zero, zero)

    @property
    def scale(self) -> torch.Tensor:
        return torch.exp2(self.exponent.float())

    def after(self, overflowed: torch.Tensor) -> EntryScaleOnDevice:
        """The entry scale after a step.

        overflowed: whether a gradient was not finite, 0-dim, of bool.
        """
        lowest = min(FLOAT16.min_exponent, self.initial)
        at_lowest = self.exponent <= lowest
        good_steps = torch.where(overflowed, 0, self.good_steps + 1)
        grows = ~overflowed & (self.exponent < self._ceiling) & (good_steps >= self._growth_interval)
        lowered = torch.where(at_lowest, self.exponent, self.exponent - 1)
        return replace(
            self,
            exponent=torch.where(overflowed, lowered, self.exponent + grows),
            good_steps=torch.where(grows, 0, good_steps),
            overflows=torch.where(overflowed, self.overflows + at_lowest, 0),
            skipped=self.skipped + overflowed,
        )

    def to(self, device: torch.device) -> EntryScaleOnDevice:
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def to_state(self) -> dict[str, int]:
        """Plain numbers, as `EntryScale.to_state` has them; they wait for the device."""
        return {"initial": self.initial} | {name: int(value) for name, value in self._tensors().items()}

    def restored(self, state: dict[str, Any]) -> EntryScaleOnDevice:
        """This scale where `to_state` was taken; back at its initial value if that was another one there."""
        kept = self._tensors() if state["initial"] == self.initial else {"skipped": self.skipped}
        return replace(self, **{name: torch.full_like(value, state[name]) for name, value in kept.items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }

    @property
    def _ceiling(self) -> int:
        return self.initial if self.interval is None else max(FLOAT16.max_exponent, self.initial)

    @property
    def _growth_interval(self) -> int | torch.Tensor:
        if self.interval is None:
            return RECOVERY_INTERVAL
        return torch.where(self.skipped > 0, self.interval, 1)
