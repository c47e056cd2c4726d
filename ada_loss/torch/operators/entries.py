"""Where gradients enter float16: operators of plain tensors whose results are scaled.

To scale what is no gradient would be right as well, since a scaled tensor behaves as its true value; it would
cost time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ada_loss.torch.operators.arguments import widened
from ada_loss.torch.operators.collectives import packs_gradients, refuse_rounding
from ada_loss.torch.operators.exits import cast, cast_to
from ada_loss.torch.operators.results import entering, one
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import OF_ZERO, Shifts

aten, prims = torch.ops.aten, torch.ops.prims


def begins_scaled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> Any:
    """The result of an operator of plain tensors, if it enters a dtype that is scaled; NotImplemented if
    not."""
    entry = _ENTRIES.get(func)
    if entry is not None:
        return entry(func, args, kwargs, shifts)
    if packs_gradients(func) and torch.float16 in shifts.dtypes:
        refuse_rounding(func, args, kwargs)
    return NotImplemented


def _cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> Any:
    """A true gradient that is rounded: scaled first.

    Raises:
        RuntimeError: it is sparse or complex, and so cannot be scaled.
    """
    value, dtype = args[0], cast_to(args, kwargs)
    if value.is_complex():
        if dtype is torch.complex32 and value.dtype is not dtype and torch.float16 in shifts.dtypes:
            raise RuntimeError(
                "A gradient in complex32 cannot be scaled: compute this part in complex64, from float32."
            )
        return NotImplemented
    if dtype not in shifts.dtypes or value.dtype in shifts.dtypes or not value.is_floating_point():
        return NotImplemented
    if value.layout is not torch.strided:
        raise RuntimeError(
            "A sparse gradient in float16 cannot be scaled: keep this parameter in float32 under "
            "torch.autocast, or set its grad_dtype to torch.float32."
        )
    return cast(func, (entering(value, dtype, shifts), *args[1:]), kwargs)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> Any:
    """A gradient that was computed in forward, in float16, times that of the loss, a number in float32."""
    left, right = args[:2]
    if kwargs or not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return NotImplemented
    dtype = torch.result_type(left, right)
    if dtype not in shifts.dtypes or left.dtype == right.dtype or not _both_float(left, right):
        return NotImplemented
    return entering(func(widened(left), widened(right)), dtype, shifts)


def _both_float(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.is_floating_point() and right.is_floating_point()


def _zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shifts: Shifts) -> Any:
    """What a backward function is going to add gradients to."""
    if torch._C._current_autograd_node() is None:
        return NotImplemented
    result = func(*args, **kwargs)
    if result.dtype not in shifts.dtypes or result.layout is not torch.strided:
        return result
    return ScaledTensor(result, torch.full_like(one(result), OF_ZERO), shifts)


_ENTRIES: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _cast,
    prims.convert_element_type.default: _cast,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _product,
    aten.zeros.default: _zeros,
    aten.zeros_like.default: _zeros,
    aten.new_zeros.default: _zeros,
}
