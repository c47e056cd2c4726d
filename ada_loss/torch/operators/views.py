"""Operators that look at a tensor's data in another shape, or only at its shape and dtype."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ada_loss.torch.operators.arguments import mapped, raw, scaled_in
from ada_loss.torch.operators.registry import register
from ada_loss.torch.operators.results import one
from ada_loss.torch.scaled_tensor import ScaledTensor


@cache
def is_view(func: Any) -> bool:
    """Whether an operator's result shares memory with its first argument, which it does not change."""
    arguments = func._schema.arguments
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write


def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The view keeps the scale, also when that changes."""
    source = args[0]
    results = func(source.scaled_data, *args[1:], **kwargs)
    if isinstance(results, torch.Tensor) and results.dtype != source.dtype:
        return NotImplemented
    return mapped(source.view_of_data, results)


def like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor of this one's kind, for which the scale means nothing."""
    found = scaled_in((args[1:], kwargs))
    if found or not isinstance(args[0], ScaledTensor):
        return NotImplemented
    result = func(*mapped(raw, args), **kwargs)
    if result.dtype != args[0].dtype:
        return result
    return ScaledTensor(result, one(result), args[0].shifts)


register(
    "passes through",
    like,
    *"""
    aten.zeros_like aten.ones_like aten.empty_like aten.full_like aten.new_zeros aten.new_ones aten.new_empty
    aten.new_full aten.new_empty_strided
    """.split(),
)
