"""Arguments of operators: where the scaled tensors are, and what the operator gets in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ada_loss.torch.scaled_tensor import ScaledTensor


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of every leaf of nested tuples, lists and dicts."""
    if isinstance(value, tuple):
        return tuple(mapped(function, item) for item in value)
    if isinstance(value, list):
        return [mapped(function, item) for item in value]
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(tuple(value.values()))
    else:
        yield value


def scaled_in(value: Any) -> list[ScaledTensor]:
    """Every scaled tensor among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, ScaledTensor)]


def only_scaled(
    positions: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[ScaledTensor]:
    """The scaled arguments, if all of them are at these positions; none if one is elsewhere."""
    found = []
    for i, arg in enumerate(args):
        inside = scaled_in(arg)
        if inside and i not in positions:
            return []
        found += inside
    return [] if scaled_in(kwargs) else found


def raw(leaf: Any) -> Any:
    """A scaled tensor's data as it is."""
    return leaf.scaled_data if isinstance(leaf, ScaledTensor) else leaf


def shown_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autograd sees; a scaled tensor's own attribute is many times as slow."""
    return tensor.shown_dtype if isinstance(tensor, ScaledTensor) else tensor.dtype


def widened(leaf: Any) -> Any:
    """float16 becomes float32: of scaled tensors the data, of plain ones the values, and the name of the
    dtype."""
    if isinstance(leaf, torch.Tensor):
        data = raw(leaf)
        return data.float() if data.dtype == torch.float16 else data
    return torch.float32 if leaf is torch.float16 else leaf


def true(leaf: Any) -> Any:
    """`widened`, but of scaled tensors the true value."""
    if isinstance(leaf, ScaledTensor):
        return leaf.to_true()
    return widened(leaf)
