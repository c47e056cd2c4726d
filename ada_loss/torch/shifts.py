"""Which factor scales a gradient further: the rules of `ada_loss.core.rules` for tensors.

Nothing here reads a number back, so nothing waits for a GPU. Where those rules speak of exponents, these have
the powers of two themselves: a factor is 2**shift. `auto` does not have to estimate a product's peak as
there: the product is at hand in float32 before it is rounded, and so is its peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.formats import FLOAT16
from ada_loss.core.maths import floor_log2
from ada_loss.core.measurement import Measurement, Needs
from ada_loss.core.rules import ABS_RANGE, APPROX_RANGE, AUTO, FIXED, Rule
from ada_loss.core.rules.auto import CAST_HEADROOM as AUTO_CAST_HEADROOM
from ada_loss.core.rules.auto import HEADROOM as AUTO_HEADROOM
from ada_loss.torch.statistics import MATHS, finite_peak, peak, statistics

OF_ZERO = 2.0**100
"""The scale of zeros, which fit any: where they meet others, those decide."""

UNIT = torch.ones((), dtype=torch.float64)
"""The scale of true values; told by its identity, so that nothing is computed with it."""

_ONE, _MANTISSA = 0x3F800000, 0x7FFFFF
"""The bits of 1 in float32, and those of a mantissa."""

_TINY = 2.0**-111
"""Peaks below count as this much: what they are scaled by stays within float32."""


def floor_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two at most x, a positive float32 tensor: x without its mantissa. Infinity for
    what is not finite, 0 for subnormal numbers."""
    return torch.bitwise_and(x.view(torch.int32), 0x7F800000).view(torch.float32)


def times(x: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """x times a power of two, in x's dtype, also where x has no axes either."""
    if power is UNIT:
        return x
    return x * (power if x.dim() else power.to(x.dtype))


def over(x: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """x divided by a power of two, in x's dtype."""
    if power is UNIT:
        return x
    return x / (power if x.dim() else power.to(x.dtype))


def combined(scales: Iterable[torch.Tensor]) -> torch.Tensor:
    """The product of scales."""
    return reduce(torch.mul, [scale for scale in scales if scale is not UNIT] or [UNIT])


def quotient(scale: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """One scale divided by another."""
    if scale is by:
        return UNIT
    return 1 / by if scale is UNIT else scale if by is UNIT else scale / by


def factor_to(target: float, magnitude: torch.Tensor) -> torch.Tensor:
    """The largest power of two that leaves a magnitude, of float32, at or below `target`; 1 if it is not
    finite.

    By its bits: the exponents' difference, one less where the magnitude's mantissa is the larger one. That is
    exact, and takes few operations of a compiled graph.
    """
    bits = np.float32(target).view(np.int32).item()
    larger = _MANTISSA - (bits & _MANTISSA)
    ones = (magnitude.clamp(min=_TINY).view(torch.int32) + (larger - _ONE)) & ~_MANTISSA
    factor = ((bits & ~_MANTISSA) - ones).clamp(min=0).view(torch.float32)
    return torch.where(torch.isfinite(magnitude), factor, 1.0)


@dataclass(frozen=True, eq=False)
class Shifts:
    """How far gradients are scaled, where they enter and by what is computed from them. This class is
    `fixed`: as far as the entry scale, and no further.

    config: the settings.
    entry: the scale with which gradients enter, 0-dim, of float32, on any device; overflow lowers it. Without
        it `config.init_scale`.
    dtypes: what is scaled.
    late: whether gradients stay in float32 until a product takes them, as in a compiled graph, where that
        costs nothing.
    """

    config: AdaLossConfig
    entry: torch.Tensor | None = None
    dtypes: frozenset[torch.dtype] = frozenset([torch.float16])
    late: bool = False
    _entry: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    _backoff: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def entering(self, gradient: torch.Tensor) -> torch.Tensor:
        """The scale of a true gradient that is about to be rounded."""
        return self._entry_on(gradient.device)

    def of_product(
        self,
        product: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        factor: torch.Tensor,
        fan: int,
    ) -> torch.Tensor:
        """The factor for a product of a gradient with something else, before it is rounded.

        product: what was computed of `gradient`, which is at `scale`, and `factor`, in float32.
        fan: how many products one of its elements adds up.
        """
        return torch.ones_like(scale)

    def of_sum(
        self, total: torch.Tensor, scale: torch.Tensor, meeting: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """The factor for anything else that is linear in gradients, before it is rounded.

        total: in float32, at `scale`.
        meeting: where several gradients meet, their scales.
        """
        if not meeting:
            return torch.ones_like(scale)
        highest = reduce(torch.maximum, [torch.where(s < OF_ZERO, s, scale) for s in meeting])
        return torch.minimum(highest / scale, factor_to(FLOAT16.max, finite_peak(total)))

    def rounding(self, gradient: torch.Tensor) -> torch.Tensor:
        """The factor for a gradient that has stayed in float32, as a product is about to take it."""
        return UNIT

    def _entry_on(self, device: torch.device) -> torch.Tensor:
        """The entry scale on a device, of float64."""
        if device not in self._entry:
            scale = self.config.init_scale if self.entry is None else self.entry
            self._entry[device] = _on(device, scale).double()
        return self._entry[device]

    def _backoff_on(self, device: torch.device) -> torch.Tensor | float:
        """What overflow has lowered the entry scale by, a power of two at most 1."""
        if self.entry is None:
            return 1.0
        if device not in self._backoff:
            self._backoff[device] = (_on(device, self.entry) / self.config.init_scale).clamp(max=1.0)
        return self._backoff[device]


def _on(device: torch.device, scale: torch.Tensor | float) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return scale.to(device, non_blocking=True)
    return torch.full((), scale, device=device)


@dataclass(frozen=True, eq=False)
class AutoShifts(Shifts):
    """`auto`: peaks at a fixed distance below the largest float16."""

    def entering(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._towards(AUTO_CAST_HEADROOM, finite_peak(gradient)).double()

    def of_product(
        self,
        product: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        factor: torch.Tensor,
        fan: int,
    ) -> torch.Tensor:
        return self._towards(AUTO_HEADROOM, peak(product))

    def of_sum(
        self, total: torch.Tensor, scale: torch.Tensor, meeting: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        return self._towards(AUTO_HEADROOM, finite_peak(total) if meeting else peak(total))

    def rounding(self, gradient: torch.Tensor) -> torch.Tensor:
        return self._towards(AUTO_HEADROOM, gradient.abs().amax())

    def _towards(self, headroom: int, magnitude: torch.Tensor) -> torch.Tensor:
        factor = factor_to(FLOAT16.max * 2.0**-headroom, magnitude)
        return factor if self.entry is None else factor * self._backoff_on(magnitude.device)


@dataclass(frozen=True, eq=False)
class RangeShifts(Shifts):
    """`approx_range` and `abs_range`: until hardly any element underflows, within the paper's bounds."""

    def entering(self, gradient: torch.Tensor) -> torch.Tensor:
        entry = self._entry_on(gradient.device)
        measured = Measurement(statistics(gradient, self._needs(is_cast=True)))
        return entry * self._within_bounds(measured, entry, torch.ones_like(entry))

    def of_product(
        self,
        product: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        factor: torch.Tensor,
        fan: int,
    ) -> torch.Tensor:
        needs = self._needs(is_cast=False)
        measured = Measurement(statistics(gradient, needs), statistics(factor, needs), fan)
        return self._within_bounds(measured, scale, scale)

    def _needs(self, *, is_cast: bool) -> Needs:
        return self.config.rule.needs(self.config, is_cast)

    def _within_bounds(
        self, measured: Measurement, carried: torch.Tensor, measured_at: torch.Tensor
    ) -> torch.Tensor:
        """The factor that the rule wants, as far as it is safe and the settings allow; see
        `ada_loss.core.rules.paper`. The scale that the gradient carries may differ from that at which it was
        measured."""
        low, high = (extreme.float() for extreme in self.config.rule.extremes(self.config, measured, MATHS))
        backoff = self._backoff_on(carried.device)
        ahead = backoff * (measured_at / carried)
        wanted = factor_to(FLOAT16.smallest_subnormal, low) * ahead
        factor = torch.minimum(wanted.clamp(min=1.0), factor_to(FLOAT16.max, high) * ahead)
        if self.config.scale_upper_bound is not None:
            factor = factor.clamp(max=2.0 ** floor_log2(self.config.scale_upper_bound))
        if self.config.accum_upper_bound is not None:
            accumulated = 2.0 ** floor_log2(self.config.accum_upper_bound) * backoff / carried
            factor = torch.minimum(factor, accumulated)
        return torch.where((high > 0) & torch.isfinite(high), factor, torch.ones_like(factor))


_SHIFTS: dict[Rule, type[Shifts]] = {
    AUTO: AutoShifts,
    APPROX_RANGE: RangeShifts,
    ABS_RANGE: RangeShifts,
    FIXED: Shifts,
}

METHODS = tuple(rule.name for rule in _SHIFTS)
"""The methods of `AdaLossConfig` that this front end knows."""


def shifts_for(config: AdaLossConfig, entry: torch.Tensor | None = None, *, late: bool = False) -> Shifts:
    """The rule that the settings name. For entry and late see `Shifts`.

    Raises:
        ValueError: this front end does not have the method or the setting.
    """
    if config.rule not in _SHIFTS:
        raise ValueError(
            f"loss_scale_method must be one of {', '.join(METHODS)} in PyTorch, "
            f"not {config.loss_scale_method!r}."
        )
    if config.update_per_n_iteration != 1:
        raise ValueError(
            "update_per_n_iteration must be 1 in PyTorch, where scales are chosen anew in every step, "
            f"not {config.update_per_n_iteration!r}."
        )
    return _SHIFTS[config.rule](config, entry, late=late)
