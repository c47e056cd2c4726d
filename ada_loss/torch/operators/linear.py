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
from ada_loss.torch.shifts import over


def passes(*positions: int) -> Rule:
    """The rule of an operator that is linear in its argument at one of these positions and makes nothing
    larger."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        if len(found) != 1:
            return NotImplemented
        source = found[0]
        results = func(*mapped(raw if source.is_rounded else widened, args), **kwargs)
        return mapped(lambda result: _at_scale_of(source, result), results)

    return rule


def _at_scale_of(source: ScaledTensor, result: Any) -> Any:
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return result
    if result.dtype == source.scaled_data.dtype and result.layout is torch.strided:
        return source.with_data(result)
    return over(widened(result), source.scale)


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
        dtype = kwargs.get("dtype") or source.shown_dtype
        count = 1 if isinstance(results, torch.Tensor) else len(results)
        dtypes = [_dtype_of(args, i, dtype) for i in dtypes_of] if dtypes_of else [dtype] * count
        return all_rounded(results, dtypes, source.scale, source.shifts, source.shifts.of_sum)

    return rule


def _dtype_of(args: tuple[Any, ...], position: int, default: torch.dtype) -> torch.dtype:
    """Of an argument that may be missing, for a result that is then missing too or has the gradient's
    dtype."""
    arg = raw(args[position]) if position < len(args) else None
    return arg.dtype if isinstance(arg, torch.Tensor) else default


register(
    "passes through",
    passes(0),
    *"""
    aten.neg aten.clone aten.flip aten.roll aten.rot90 aten.tril aten.triu aten.index_select aten.index
    aten.gather aten.take aten.im2col aten.pixel_shuffle aten.pixel_unshuffle aten.channel_shuffle
    aten.masked_scatter_backward aten.slice_backward aten.select_backward aten.diagonal_backward
    aten.constant_pad_nd aten._unsafe_view aten.unfold aten._reshape_copy
    aten.threshold_backward aten.hardtanh_backward aten.hardshrink_backward aten.softshrink_backward
    aten.leaky_relu_backward aten.rrelu_with_noise_backward aten.elu_backward aten.glu_backward
    aten.gelu_backward aten.silu_backward aten.mish_backward aten.sigmoid_backward aten.tanh_backward
    aten.softplus_backward aten.hardsigmoid_backward aten.hardswish_backward aten.log_sigmoid_backward
    aten._softmax_backward_data aten._masked_softmax_backward aten.avg_pool2d_backward
    """.split(),
)
register(
    "sums",
    sums(0),
    *"""
    aten.sum aten.mean aten.cumsum aten.trace aten.native_dropout_backward aten.embedding_dense_backward
    aten._embedding_bag_dense_backward aten._embedding_bag_per_sample_weights_backward
    aten._log_softmax_backward_data aten.max_pool2d_with_indices_backward
    aten.max_pool3d_with_indices_backward aten.adaptive_max_pool2d_backward
    aten.adaptive_max_pool3d_backward aten.fractional_max_pool2d_backward
    aten.fractional_max_pool3d_backward aten.avg_pool3d_backward aten._adaptive_avg_pool2d_backward
    aten._adaptive_avg_pool3d_backward aten.upsample_nearest1d_backward aten.upsample_nearest2d_backward
    aten.upsample_nearest3d_backward aten._upsample_nearest_exact1d_backward
    aten._upsample_nearest_exact2d_backward aten._upsample_nearest_exact3d_backward
    aten.upsample_linear1d_backward aten.upsample_bilinear2d_backward aten.upsample_bicubic2d_backward
    aten.upsample_trilinear3d_backward aten._upsample_bilinear2d_aa_backward
    aten._upsample_bicubic2d_aa_backward aten.reflection_pad1d_backward aten.reflection_pad2d_backward
    aten.reflection_pad3d_backward aten.replication_pad1d_backward aten.replication_pad2d_backward
    aten.replication_pad3d_backward aten.col2im aten.unfold_backward aten._prelu_kernel_backward
    aten.mse_loss_backward aten.smooth_l1_loss_backward aten.huber_loss_backward
    aten.soft_margin_loss_backward aten.binary_cross_entropy_backward aten.nll_loss_backward
    aten.nll_loss2d_backward aten.multi_margin_loss_backward aten.multilabel_margin_loss_backward
    aten.logit_backward aten.xlogy aten.special_xlog1py aten.grid_sampler_2d_backward
    aten.grid_sampler_3d_backward aten._segment_reduce_backward
    """.split(),
)
register("sums", sums(0, 1, 2), "aten._trilinear")
register("sums", sums(0, 1), "aten.linalg_cross")
register("sums", sums(0, dtypes_of=(1, 5, 5)), "aten.native_layer_norm_backward")
register("sums", sums(0, dtypes_of=(1, 4)), "aten._fused_rms_norm_backward")
register("sums", sums(0, dtypes_of=(1, 2, 2)), "aten.native_batch_norm_backward", "aten.batch_norm_backward")
register("sums", sums(0, dtypes_of=(1, 4, 4)), "aten.native_group_norm_backward")
register("sums", sums(0, dtypes_of=(1, 2, 3)), "aten._scaled_dot_product_flash_attention_for_cpu_backward")
register("sums", sums(0), "aten._thnn_fused_gru_cell_backward")
