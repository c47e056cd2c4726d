"""Results of operators that were computed in float32: scaled, then rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import UNIT, AutoShifts, Shifts, combined, over, times

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The factor for a result, of the result and its scale."""


def rounded(
    result: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, shifts: Shifts, choose: Choose
) -> torch.Tensor:
    """A result in the dtype that the operator would have given it, scaled further where that dtype is scaled;
    otherwise the true value.

    result: the value times `scale`.
    """
    if dtype not in shifts.dtypes:
        return over(result, scale).to(dtype)
    if result.layout is not torch.strided:
        return over(result, scale)
    if shifts.late:
        return kept(result, dtype, scale, shifts, choose)
    factor = choose(result, scale)
    return ScaledTensor(times(result, factor).to(dtype), scale * factor, shifts)


def kept(
    result: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, shifts: Shifts, choose: Choose
) -> ScaledTensor:
    """A result that stays in float32: of `auto` the true value, whose factor is chosen when it is rounded."""
    if isinstance(shifts, AutoShifts):
        return ScaledTensor(over(result, scale), UNIT, shifts, dtype=dtype)
    scale = one(result) if scale is UNIT else scale
    factor = choose(result, scale)
    return ScaledTensor(times(result, factor), scale * factor, shifts, dtype=dtype)


def rounded_late(tensor: ScaledTensor) -> ScaledTensor:
    """A tensor that stayed in float32, rounded now. Views of the same data share the factor."""
    if tensor.is_rounded:
        return tensor
    family = tensor.family
    if family.factor is None:
        family.factor = tensor.shifts.rounding(family.root)
    data = times(tensor.scaled_data, family.factor).to(tensor.shown_dtype)
    return ScaledTensor(data, combined([tensor.scale, family.factor]), tensor.shifts)


def all_rounded(
    results: Any, dtypes: Sequence[torch.dtype], scale: torch.Tensor, shifts: Shifts, choose: Choose
) -> Any:
    """`rounded` for every tensor of an operator's result, which may have several."""
    if isinstance(results, torch.Tensor):
        return rounded(results, dtypes[0], scale, shifts, choose)
    return type(results)(
        [
            rounded(result, dtype, scale, shifts, choose) if isinstance(result, torch.Tensor) else result
            for result, dtype in zip(results, dtypes, strict=True)
        ]
    )


def entering(value: torch.Tensor, dtype: torch.dtype, shifts: Shifts) -> ScaledTensor:
    """A true value, about to be rounded to a dtype that is scaled: scaled first."""
    wide = torch.promote_types(dtype, torch.float32)
    if shifts.late and isinstance(shifts, AutoShifts):
        return ScaledTensor(value.to(wide), UNIT, shifts, dtype=dtype)
    scale = shifts.entering(value)
    if shifts.late:
        return ScaledTensor(times(value.to(wide), scale), scale, shifts, dtype=dtype)
    return ScaledTensor(times(value.to(wide), scale).to(dtype), scale, shifts)


def one(like: torch.Tensor) -> torch.Tensor:
    """The scale of what is not scaled."""
    return torch.ones((), dtype=torch.float64, device=like.device)
