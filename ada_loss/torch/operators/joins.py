"""Operators in which several gradients meet: brought to one scale before they are added or put together."""

from __future__ import annotations

from functools import partial, reduce
from types import NoneType
from typing import Any

import torch

from ada_loss.torch.operators.arguments import leaves, mapped, only_scaled, raw, shown_dtype, widened
from ada_loss.torch.operators.linear import passes
from ada_loss.torch.operators.registry import Rule, register
from ada_loss.torch.operators.results import all_rounded, one
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import UNIT, quotient, times


def joins(*positions: int) -> Rule:
    """The rule of an operator that is linear in all of its arguments at these positions together, each a
    tensor or a list of tensors.

    They are brought to the smallest scale among them, in float32, where nothing overflows. A gradient that
    only meets zeros given as numbers passes through.
    """

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        meeting = list(leaves([args[i] for i in positions if i < len(args)]))
        tensors = [leaf for leaf in meeting if isinstance(leaf, torch.Tensor)]
        if not found or any(leaf != 0 for leaf in meeting if not isinstance(leaf, (torch.Tensor, NoneType))):
            return NotImplemented
        if len(tensors) == 1 and not kwargs:
            return passes(*positions)(func, args, kwargs)
        shifts, dtype = found[0].shifts, _joint_dtype(tensors)
        scales = [leaf.scale for leaf in found]
        if any(not isinstance(leaf, ScaledTensor) for leaf in tensors):
            scales.append(UNIT if shifts.late else one(found[0]))
        lowest = _lowest(scales)

        def aligned(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            scale = leaf.scale if isinstance(leaf, ScaledTensor) else UNIT
            return times(widened(leaf), quotient(lowest, scale))

        arguments = [mapped(aligned if i in positions else widened, arg) for i, arg in enumerate(args)]
        results = func(*arguments, **kwargs)
        count = 1 if isinstance(results, torch.Tensor) else len(results)
        choose = partial(shifts.of_sum, meeting=scales)
        return all_rounded(results, [dtype] * count, lowest, shifts, choose)

    return rule


def _lowest(scales: list[torch.Tensor]) -> torch.Tensor:
    """The smallest scale."""
    others = [scale for scale in scales if scale is not UNIT]
    if not others:
        return UNIT
    lowest = reduce(torch.minimum, others)
    return lowest if len(others) == len(scales) else lowest.clamp(max=1.0)


def _joint_dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype of what is computed of all of these; a tensor without axes counts less than one with some."""
    with_axes = [tensor for tensor in tensors if raw(tensor).dim()]
    return reduce(torch.promote_types, [shown_dtype(tensor) for tensor in with_axes or tensors])


register("joins", joins(0, 1), "aten.add", "aten.sub")
register("joins", joins(0), "aten.cat", "aten.stack")
register("joins", joins(1, 2), "aten.where")
register("joins", joins(0, 2), *"aten.index_put aten._unsafe_index_put aten.put".split())
register("joins", joins(0, 2), *"aten.masked_fill aten.masked_scatter".split())
register("joins", joins(0, 3), *"aten.scatter aten.scatter_add aten.index_add aten.index_copy".split())
register("joins", joins(0, 3), *"aten.index_fill aten._unsafe_masked_index_put_accumulate".split())
register("joins", joins(0, 3), "aten._unsafe_masked_index")
register("joins", joins(0, 1), *"aten.select_scatter aten.slice_scatter aten.diagonal_scatter".split())
register("joins", joins(0, 1), "aten.as_strided_scatter")
register("joins", joins(0, 1), "aten._thnn_fused_lstm_cell_backward_impl")
