"""Kernels that cannot be computed in float32: they know float16 alone, or keep what only they can read.

Their results are rounded by the kernel itself, so the gradient is scaled before it goes in, as far as no sum
within is likely to overflow. What they return is at that scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from ada_loss.core.formats import FLOAT16
from ada_loss.core.measurement import Measurement, Needs
from ada_loss.core.rules.auto import DEVIATIONS, expected_amax
from ada_loss.torch.operators.arguments import mapped, only_scaled, raw, scaled_in
from ada_loss.torch.operators.registry import Rule, register
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import factor_to, over, times
from ada_loss.torch.statistics import MATHS, peak, statistics

_MARGIN_OF_LAYERS = 2.0**12
"""What sums over units and steps of a recurrent layer may make of a gradient: half of float16's exponents."""


def attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gradients of softmax(q k^T) v, arguments grad, q, k, v.

    Those of the scores are sums over features; those of q, k and v sums of them, with weights that add up to
    1 for a query, and for a key are as random as the rule `auto` takes products to be.
    """
    found = only_scaled((0,), args, kwargs)
    if len(found) != 1:
        return NotImplemented
    gradient, query, key, value = args[:4]
    nothing = Needs()
    measured = Measurement(
        statistics(gradient.scaled_data, nothing), statistics(value, nothing), query.shape[-1]
    )
    of_scores = 2 * expected_amax(measured, MATHS) * torch.maximum(peak(query), peak(key))
    queries = max(1.0, DEVIATIONS * math.sqrt(query.shape[-2]))
    bound = queries * torch.maximum(of_scores.float(), peak(gradient.scaled_data))
    return _at_scale(func, args, kwargs, found, gradient.scale * factor_to(FLOAT16.max, bound))


def recurrent(*positions: int) -> Rule:
    """The rule of whole recurrent layers, with gradients at these positions."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = only_scaled(positions, args, kwargs)
        if not found:
            return NotImplemented
        fits = [g.scale * factor_to(FLOAT16.max, peak(g.scaled_data) * _MARGIN_OF_LAYERS) for g in found]
        gradients = [args[i] for i in positions if isinstance(args[i], torch.Tensor)]
        return _at_scale(func, args, kwargs, gradients, reduce(torch.minimum, fits))

    return rule


def normalization(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch normalization, arguments input, grad, weight, ..., inverse deviation (at 6): the weight, in
    float32, carries the factor of the input's gradient; those of weight and bias, of float32 as well, do not
    depend on it."""
    found = only_scaled((1,), args, kwargs)
    weight, inverse_deviation = args[2], args[6]
    if len(found) != 1 or weight is None or weight.dtype != torch.float32:
        return NotImplemented
    gradient = found[0]
    # The gradient, its mean, and its mean product with the normalized input, times that.
    bound = 4 * peak(gradient.scaled_data) * peak(weight * inverse_deviation)
    factor = factor_to(FLOAT16.max, bound)
    arguments = [raw(arg) for arg in args]
    arguments[2] = weight * factor
    of_input, *of_parameters = func(*arguments, **kwargs)
    scaled = ScaledTensor(of_input, gradient.scale * factor, gradient.shifts)
    return (scaled, *(over(result, gradient.scale) for result in of_parameters))


def _at_scale(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: Sequence[torch.Tensor],
    scale: torch.Tensor,
) -> Any:
    """The kernel's results for these gradients brought to one scale; plain ones among them are true."""
    shifts = scaled_in((args, kwargs))[0].shifts
    dtype = raw(gradients[0]).dtype

    def brought(leaf: Any) -> Any:
        if not any(leaf is gradient for gradient in gradients):
            return leaf
        factor = scale / leaf.scale if isinstance(leaf, ScaledTensor) else scale
        return times(raw(leaf).float(), factor).to(dtype)

    def finished(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return ScaledTensor(leaf, scale, shifts) if leaf.dtype == dtype else over(leaf, scale)

    return mapped(finished, func(*mapped(brought, args), **kwargs))


register(
    "decides",
    attention,
    *"""
    aten._scaled_dot_product_flash_attention_backward aten._scaled_dot_product_efficient_attention_backward
    aten._scaled_dot_product_cudnn_attention_backward aten._flash_attention_backward
    aten._scaled_dot_product_fused_attention_overrideable_backward
    """.split(),
)
register("decides", recurrent(7, 8, 9), "aten._cudnn_rnn_backward", "aten.miopen_rnn_backward")
register("decides", recurrent(10, 11, 12), "aten.mkldnn_rnn_layer_backward")
register("decides", normalization, "aten.cudnn_batch_norm_backward", "aten.miopen_batch_norm_backward")
