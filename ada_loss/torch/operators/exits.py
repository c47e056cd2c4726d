"""Casts: where gradients leave float16 as true values, and where true values enter."""

from __future__ import annotations

from typing import Any

import torch

from ada_loss.torch.operators.registry import implements
from ada_loss.torch.operators.results import entering, rounded
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import Shifts


@implements("exit", "aten._to_copy", "prims.convert_element_type")
def cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """To a dtype that is not scaled, the true value; otherwise the data, or wherever they are copied to."""
    gradient, dtype = args[0], cast_to(args, kwargs)
    if dtype is None or dtype == gradient.dtype:
        data = func(gradient.scaled_data, *args[1:], **kwargs)
        return ScaledTensor(data, gradient.scale.to(data.device, non_blocking=True), gradient.shifts)
    if dtype in gradient.shifts.dtypes:
        wide = gradient.scaled_data.to(torch.promote_types(gradient.dtype, torch.float32))
        return rounded(wide, dtype, gradient.scale, gradient.shifts, gradient.shifts.of_sum)
    return func(gradient.to_true(), *args[1:], **kwargs)


def cast_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a cast gives; None where it keeps the dtype."""
    return kwargs.get("dtype") or (args[1] if len(args) > 1 else None)


def is_entry(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> bool:
    """Whether a call casts plain numbers from a wider dtype to one that is scaled."""
    if (
        func is not torch.ops.aten._to_copy.default
        and func is not torch.ops.prims.convert_element_type.default
    ):
        return False
    source = args[0].dtype
    return cast_to(args, kwargs) in shifts.dtypes and source not in shifts.dtypes and source.is_floating_point


def enter(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> ScaledTensor:
    """The cast, scaled before it is rounded."""
    dtype = cast_to(args, kwargs)
    entered = entering(args[0], dtype, shifts)
    if func is torch.ops.prims.convert_element_type.default:
        return entered
    return cast(func, (entered,), kwargs)
