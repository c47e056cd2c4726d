"""What rules want to know of a tensor, as tensors without axes that stay on its device."""

from __future__ import annotations

import math

import torch

from ada_loss.core.maths import Maths
from ada_loss.core.measurement import Needs, Statistics

MATHS = Maths(torch.sqrt, torch.exp, torch.minimum, lambda x, y: x.clamp(min=y))
"""For formulas of rules; the second of two to take the larger of is a number there."""


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


def statistics(x: torch.Tensor, needs: Needs) -> Statistics:
    """The statistics that a rule needs, in float64; whether elements are finite shows in the amax.

    Args:
        x: a tensor of any float type.
        needs: what to look at beside amax and mean square.
    """
    magnitudes = x.abs().double()
    nonzero = magnitudes > 0
    logs = torch.where(nonzero, magnitudes, 1.0).log() if needs.logs else torch.zeros(1, device=x.device)
    return Statistics(
        size=x.numel(),
        nonzero=nonzero.sum().clamp(min=1),
        sum_squares=magnitudes.square().sum(),
        amax=peak(x).double(),
        amin=torch.where(nonzero, magnitudes, math.inf).amin() if needs.amin and x.numel() else 0.0,
        finite=True,
        sum_logs=logs.sum(),
        sum_squared_logs=logs.square().sum(),
    )
