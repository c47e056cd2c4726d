"""Operators in which several gradients meet: brought to one scale before they are added or put together."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch

from ada_loss.torch.operators.arguments import leaves, mapped, only_scaled, widened
from ada_loss.torch.operators.registry import Rule, register
from ada_loss.torch.operators.results import rounded
from ada_loss.torch.scaled_tensor import ScaledTensor


def joins(*positions: int) -> Rule:
    """The rule of an operator that is linear in all of its arguments at these positions together, each a
    tensor or a list of tensors.

    They are brought to the smallest scale among them, in float32, where nothing overflows.
    """

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        meeting = [args[i] for i in positions if i < len(args)]
        if not found or not all(isinstance(leaf, torch.Tensor) for leaf in leaves(meeting)):
            return NotImplemented
        shifts, dtype = found[0].shifts, _joint_dtype(meeting)
        scales = [leaf.scale for leaf in found]
        lowest, highest = reduce(torch.minimum, scales), reduce(torch.maximum, scales)
        if any(not isinstance(leaf, ScaledTensor) for leaf in leaves(meeting)):
            lowest, highest = lowest.clamp(max=1.0), highest.clamp(min=1.0)

        def aligned(leaf: Any) -> Any:
            return widened(leaf) * (lowest / leaf.scale if isinstance(leaf, ScaledTensor) else lowest)

        arguments = [mapped(aligned if i in positions else widened, arg) for i, arg in enumerate(args)]
        result = func(*arguments, **kwargs)
        return rounded(
            result, dtype, lowest, shifts, lambda total, scale: shifts.of_sum(total, scale, highest)
        )

    return rule


def _joint_dtype(meeting: Any) -> torch.dtype:
    """The dtype of what is computed of all of these; a tensor without axes counts less than one with some."""
    tensors = list(leaves(meeting))
    return reduce(
        torch.promote_types,
        [t.dtype for t in tensors if t.dim() or all(not other.dim() for other in tensors)],
    )


register("joins", joins(0, 1), "aten.add", "aten.sub")
register("joins", joins(0), "aten.cat", "aten.stack")
register("joins", joins(1, 2), "aten.where")
register("joins", joins(0, 2), "aten.index_put", "aten._unsafe_index_put")
register(
    "joins",
    joins(0, 3),
    "aten.scatter",
    "aten.scatter_add",
    "aten.index_add",
    "aten.index_copy",
)
register(
    "joins",
    joins(0, 1),
    "aten.select_scatter",
    "aten.slice_scatter",
    "aten.diagonal_scatter",
    "aten.as_strided_scatter",
)
