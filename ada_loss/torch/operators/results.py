"""Results of operators that were computed in float32: scaled, then rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import Shifts, over, times

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
    factor = choose(result, scale)
    return ScaledTensor(times(result, factor).to(dtype), scale * factor, shifts)


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
    scale = shifts.entering(value)
    wide = torch.promote_types(dtype, torch.float32)
    return ScaledTensor(times(value.to(wide), scale).to(dtype), scale, shifts)


def one(like: torch.Tensor) -> torch.Tensor:
    """The scale of what is not scaled."""
    return torch.ones((), dtype=torch.float64, device=like.device)
