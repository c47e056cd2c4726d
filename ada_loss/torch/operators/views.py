"""Operators that look at a tensor's data in another shape, or only at its shape and dtype."""

from __future__ import annotations

from typing import Any

import torch

from ada_loss.torch.operators.arguments import mapped, raw, scaled_in, widened
from ada_loss.torch.operators.registry import register
from ada_loss.torch.operators.results import entering, one
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import OF_ZERO


def is_view(func: Any) -> bool:
    """Whether an operator's result shares memory with its first argument, which it does not change."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write


def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The view keeps the scale, also when that changes."""
    source = args[0]
    results = func(source.scaled_data, *args[1:], **kwargs)
    if isinstance(results, torch.Tensor) and results.dtype != source.scaled_data.dtype:
        return NotImplemented
    return mapped(source.view_of_data, results)


def bits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The bits of the true value, rounded to the tensor's own dtype."""
    if func is not torch.ops.aten.view.dtype:
        return NotImplemented
    return func(args[0].to_true().to(raw(args[0]).dtype), *args[1:], **kwargs)


def of_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What concerns the memory alone is done to that of the data."""
    return func(raw(args[0]), *args[1:], **kwargs)


def changes_shape(func: Any) -> bool:
    """Whether an operator gives its first argument another shape in place, as unsqueeze_ does."""
    return torch.Tag.inplace_view in func.tags


def change_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The data become a view of themselves, and the tensor shows its new shape to autograd."""
    tensor = args[0]
    tensor.scaled_data = func(tensor.scaled_data.view_as(tensor.scaled_data), *args[1:], **kwargs)
    with torch._C._DisableTorchDispatch():
        func(*args, **kwargs)
    return tensor


def zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor of this one's kind that holds zeros, or nothing yet."""
    if not _only_first_is_scaled(args, kwargs):
        return NotImplemented
    result = func(raw(args[0]), *args[1:], **kwargs)
    if result.dtype != raw(args[0]).dtype:
        return result
    if not args[0].is_rounded:
        return args[0].with_data(result)
    return ScaledTensor(result, torch.full_like(one(result), OF_ZERO), args[0].shifts)


def filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor of this one's kind that holds a true number everywhere."""
    if not _only_first_is_scaled(args, kwargs):
        return NotImplemented
    dtype = kwargs.get("dtype") or args[0].shown_dtype
    if dtype != args[0].shown_dtype:
        return func(raw(args[0]), *args[1:], **kwargs)
    result = func(widened(args[0]), *args[1:], **mapped(widened, kwargs))
    return entering(result, dtype, args[0].shifts)


def _only_first_is_scaled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return isinstance(args[0], ScaledTensor) and not scaled_in((args[1:], kwargs))


register(
    "passes through",
    zeros,
    *"aten.zeros_like aten.empty_like aten.new_zeros aten.new_empty aten.new_empty_strided".split(),
)
register("passes through", filled, *"aten.ones_like aten.full_like aten.new_ones aten.new_full".split())
register("view", bits, "aten.view")
register("passes through", of_memory, "aten.record_stream", "aten.is_pinned")
