"""Operators that are linear in one gradient.

What only moves or masks elements, or multiplies them by something that is at most about 1, passes data
through at its scale. What can make them larger computes in float32, and the result is scaled anew.
"""

from __future__ import annotations

from typing import Any

import torch

from ada_loss.torch.operators.arguments import mapped, only_scaled, raw, widened
from ada_loss.torch.operators.registry import Rule, register
from ada_loss.torch.operators.results import all_rounded
from ada_loss.torch.scaled_tensor import ScaledTensor


def passes(*positions: int) -> Rule:
    """The rule of an operator that is linear in its argument at one of these positions and makes nothing
    larger."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        if len(found) != 1:
            return NotImplemented
        source = found[0]
        results = func(*mapped(raw, args), **kwargs)
        return mapped(lambda result: _at_scale_of(source, result), results)

    return rule


def _at_scale_of(source: ScaledTensor, result: Any) -> Any:
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return result
    if result.dtype == source.dtype:
        return source.with_data(result)
    return (result / source.scale).to(result.dtype)


def sums(*positions: int, dtypes_of: tuple[int, ...] | None = None) -> Rule:
    """The rule of an operator that is linear in its argument at one of these positions.

    dtypes_of: for every result the position of the argument that has its dtype; without it the gradient's.
    """

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        if len(found) != 1:
            return NotImplemented
        source = found[0]
        results = func(*mapped(widened, args), **mapped(widened, kwargs))
        dtype = kwargs.get("dtype") or source.dtype
        count = 1 if isinstance(results, torch.Tensor) else len(results)
        dtypes = [_dtype_of(args, i, dtype) for i in dtypes_of] if dtypes_of else [dtype] * count
        return all_rounded(results, dtypes, source.scale, source.shifts, source.shifts.of_sum)

    return rule


def _dtype_of(args: tuple[Any, ...], position: int, default: torch.dtype) -> torch.dtype:
    """Of an argument that may be missing, for a result that is then missing too or has the gradient's
    dtype."""
    arg = args[position] if position < len(args) else None
    return arg.dtype if isinstance(arg, torch.Tensor) else default


register(
    "passes through",
    passes(0),
    *"""
    aten.neg aten.clone aten.flip aten.roll aten.tril aten.triu aten.index_select aten.index aten.gather
    aten.slice_backward aten.select_backward aten.diagonal_backward aten.constant_pad_nd aten._unsafe_view
    aten.threshold_backward aten.hardtanh_backward aten.leaky_relu_backward aten.elu_backward
    aten.gelu_backward aten.silu_backward aten.mish_backward aten.sigmoid_backward aten.tanh_backward
    aten.softplus_backward aten.hardsigmoid_backward aten.hardswish_backward aten.log_sigmoid_backward
    aten._softmax_backward_data aten.avg_pool2d_backward
    """.split(),
)
register(
    "sums",
    sums(0),
    *"""
    aten.sum aten.mean aten.cumsum aten.native_dropout_backward aten.embedding_dense_backward
    aten._log_softmax_backward_data aten.max_pool2d_with_indices_backward
    aten.max_pool3d_with_indices_backward aten.avg_pool3d_backward aten._adaptive_avg_pool2d_backward
    aten._adaptive_avg_pool3d_backward
    """.split(),
)
register("sums", sums(0, dtypes_of=(1, 5, 5)), "aten.native_layer_norm_backward")
register("sums", sums(0, dtypes_of=(1, 2, 2)), "aten.native_batch_norm_backward")
register("sums", sums(0, dtypes_of=(1, 4, 4)), "aten.native_group_norm_backward")
register("sums", sums(0, dtypes_of=(1, 2, 3)), "aten._scaled_dot_product_flash_attention_for_cpu_backward")
