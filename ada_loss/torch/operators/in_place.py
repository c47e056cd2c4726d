"""Operators that change their first argument: what the operator of the same name without the underscore
returns is written to it."""

from __future__ import annotations

from typing import Any

import torch

from ada_loss.torch.operators.arguments import true
from ada_loss.torch.operators.fallback import write
from ada_loss.torch.operators.registry import register
from ada_loss.torch.scaled_tensor import ScaledTensor


def out_of_place(func: Any) -> Any:
    """The operator that computes what this one writes to its first argument; None if there is none."""
    name = func._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, func._overloadname, None)


def write_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the operator that computes the same out of place."""
    write(args[0], out_of_place(func)(*args, **kwargs))
    return args[0]


def copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """copy_: the source in the target's shape."""
    target, source = args[:2]
    if isinstance(target, ScaledTensor):
        source = source.to(target.device).expand(target.shape)
        if isinstance(source, ScaledTensor) and source.dtype != target.dtype:
            source = true(source)
        elif not isinstance(source, ScaledTensor) and not source.is_floating_point():
            source = source.float()
    write(target, source)
    return target


def fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """fill_ and zero_: the number everywhere."""
    target = args[0]
    if not isinstance(target, ScaledTensor):
        return NotImplemented
    number = true(args[1]) if len(args) > 1 else 0.0
    write(target, torch.zeros_like(target.scaled_data, dtype=torch.float32) + number)
    return target


register("in place", copy, "aten.copy_")
register("in place", fill, "aten.fill_", "aten.zero_")
