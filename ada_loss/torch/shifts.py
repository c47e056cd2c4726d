"""Which factor scales a gradient further: the rules of `ada_loss.core.rules`, as arithmetic on tensors.

Nothing here reads a number back, so nothing waits for a GPU. Where those rules speak of exponents, these have
the powers of two themselves: a factor is 2**shift. `auto` does not have to estimate a product's peak as
there: the product is at hand in float32 before it is rounded, and so is its peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from statistics import NormalDist

import torch

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.formats import FLOAT16
from ada_loss.core.maths import floor_log2
from ada_loss.core.rules.auto import CAST_HEADROOM as AUTO_CAST_HEADROOM
from ada_loss.core.rules.auto import HEADROOM as AUTO_HEADROOM

METHODS = ("auto", "approx_range", "abs_range", "fixed")
"""The methods of `AdaLossConfig` that this front end knows."""

OF_ZERO = 2.0**100
"""The scale of zeros, which fit any: where they meet others, those decide."""

_TINY = 2.0**-111
"""Peaks below count as this much: what they are scaled by stays within float32."""


def floor_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two at most x, a positive float32 tensor: x without its mantissa. Infinity for
    what is not finite, 0 for subnormal numbers."""
    return torch.bitwise_and(x.view(torch.int32), 0x7F800000).view(torch.float32)


def times(x: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """x times a power of two, in x's dtype, also where x has no axes either."""
    return x * (power if x.dim() else power.to(x.dtype))


def over(x: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """x divided by a power of two, in x's dtype."""
    return x / (power if x.dim() else power.to(x.dtype))


def peak(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in x, 0-dim, of float32: NaN where x holds one, 0 where x is empty."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    low, high = torch.aminmax(x)  # on a CPU many times as fast as the norm
    return torch.maximum(high, -low).float()


def finite_peak(x: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude in x: what is not finite may be masked later on."""
    return peak(torch.nan_to_num(x, 0.0, 0.0, 0.0))


def factor_to(target: float, magnitude: torch.Tensor) -> torch.Tensor:
    """The largest power of two that leaves a magnitude at or below `target`; 1 if it is not finite."""
    return floor_power_of_two(target / magnitude.clamp(min=_TINY).nan_to_num(target, target))


@dataclass(frozen=True, eq=False)
class Shifts:
    """How far gradients are scaled, where they enter and by what is computed from them. This class is
    `fixed`: as far as the entry scale, and no further.

    config: the settings.
    entry: the scale with which gradients enter, 0-dim, of float32, on any device; overflow lowers it. Without
        it `config.init_scale`.
    dtypes: what is scaled.
    """

    config: AdaLossConfig
    entry: torch.Tensor | None = None
    dtypes: frozenset[torch.dtype] = frozenset([torch.float16])
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

    def _towards(self, headroom: int, magnitude: torch.Tensor) -> torch.Tensor:
        factor = factor_to(FLOAT16.max * 2.0**-headroom, magnitude)
        return factor if self.entry is None else factor * self._backoff_on(magnitude.device)


@dataclass(frozen=True, eq=False)
class RangeShifts(Shifts):
    """`approx_range` and `abs_range`: until hardly any element underflows, within the paper's bounds."""

    def entering(self, gradient: torch.Tensor) -> torch.Tensor:
        entry = self._entry_on(gradient.device)
        if self.config.loss_scale_method == "abs_range":
            low = smallest(gradient)
        elif self.config.cast_distribution == "log_normal":
            low = _low_of_log_normal(gradient, self.config.n_uf)
        else:
            low = _normal_quantile((1 + self.config.n_uf) / 2) * root_mean_square(gradient)
        return entry * self._bounded(low, finite_peak(gradient), entry, torch.ones_like(entry))

    def of_product(
        self,
        product: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        factor: torch.Tensor,
        fan: int,
    ) -> torch.Tensor:
        if self.config.loss_scale_method == "abs_range":
            low = smallest(gradient) * smallest(factor)
        else:
            # ReLU zeroes half of the terms.
            sigma = root_mean_square(gradient) * root_mean_square(factor) * math.sqrt(fan / 2)
            low = _normal_quantile((1 + self.config.n_uf) / 2) * sigma
        return self._bounded(low, fan * peak(gradient) * peak(factor), scale, scale)

    def _bounded(
        self,
        low: torch.Tensor,
        high: torch.Tensor,
        carried: torch.Tensor,
        measured_at: torch.Tensor,
    ) -> torch.Tensor:
        """The factor that brings `low` to the smallest float16, unless it would bring `high` beyond the
        largest or leave the bounds. Both magnitudes are measured at a scale; `carried` is the scale that the
        gradient has already."""
        backoff = self._backoff_on(carried.device)
        ahead = backoff * (measured_at / carried)
        wanted = factor_to(FLOAT16.smallest_subnormal, low) * ahead
        factor = torch.minimum(wanted.clamp(min=1.0), factor_to(FLOAT16.max, high) * ahead)
        if self.config.scale_upper_bound is not None:
            factor = factor.clamp(max=2.0 ** floor_log2(self.config.scale_upper_bound))
        if self.config.accum_upper_bound is not None:
            factor = torch.minimum(
                factor, 2.0 ** floor_log2(self.config.accum_upper_bound) * backoff / carried
            )
        return torch.where((high > 0) & torch.isfinite(high), factor, torch.ones_like(factor))


def shifts_for(config: AdaLossConfig, entry: torch.Tensor | None = None) -> Shifts:
    """The rule that the settings name.

    Raises:
        ValueError: this front end does not have the method or the setting.
    """
    if config.loss_scale_method not in METHODS:
        raise ValueError(
            f"loss_scale_method must be one of {', '.join(METHODS)} in PyTorch, "
            f"not {config.loss_scale_method!r}."
        )
    if config.update_per_n_iteration != 1:
        raise ValueError(
            "update_per_n_iteration must be 1 in PyTorch, where scales are chosen anew in every step, "
            f"not {config.update_per_n_iteration!r}."
        )
    return {"auto": AutoShifts, "fixed": Shifts}.get(config.loss_scale_method, RangeShifts)(config, entry)


def smallest(x: torch.Tensor) -> torch.Tensor:
    """The smallest nonzero magnitude in x, 0-dim, of float32; infinite where there is none."""
    magnitudes = x.float().abs()
    return torch.where(magnitudes > 0, magnitudes, math.inf).amin() if x.numel() else _infinity(x.device)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of all elements, 0-dim, of float32."""
    return x.float().square().mean().sqrt()


def _low_of_log_normal(x: torch.Tensor, share: float) -> torch.Tensor:
    """Below which a share of the nonzero magnitudes lies, their logarithms being taken for normal."""
    magnitudes = x.float().abs()
    nonzero = magnitudes > 0
    logs = torch.where(nonzero, magnitudes, 1.0).log().double()
    count = nonzero.sum().clamp(min=1)
    mean = logs.sum() / count
    variance = (logs.square().sum() / count - mean.square()).clamp(min=0.0)
    return torch.exp(mean + variance.sqrt() * _normal_quantile(share)).float()


def _infinity(device: torch.device) -> torch.Tensor:
    return torch.full((), math.inf, device=device)


@cache
def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
