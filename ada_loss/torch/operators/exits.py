"""Casts of scaled gradients: to a wider dtype they leave as true values."""

from __future__ import annotations

from typing import Any

import torch

from ada_loss.torch.operators.registry import implements
from ada_loss.torch.operators.results import rounded
from ada_loss.torch.scaled_tensor import ScaledTensor


@implements("exit", "aten._to_copy", "prims.convert_element_type")
def cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """To a dtype that is not scaled, the true value; otherwise the data, or wherever they are copied to."""
    gradient, dtype = args[0], cast_to(args, kwargs)
    if dtype is None or dtype == gradient.shown_dtype:
        if not gradient.is_rounded:
            return gradient
        data = func(gradient.scaled_data, *args[1:], **kwargs)
        return ScaledTensor(data, gradient.scale.to(data.device, non_blocking=True), gradient.shifts)
    if dtype in gradient.shifts.dtypes:
        wide = gradient.scaled_data.to(torch.promote_types(gradient.scaled_data.dtype, torch.float32))
        return rounded(wide, dtype, gradient.scale, gradient.shifts, gradient.shifts.of_sum)
    return func(gradient.to_true(), *args[1:], **kwargs)


def cast_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a cast gives; None where it keeps the dtype."""
    return kwargs.get("dtype") or (args[1] if len(args) > 1 else None)
