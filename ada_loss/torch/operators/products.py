"""Products: of gradients with weights and activations, where scales are chosen, and of two gradients, whose
scales multiply."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ada_loss.torch.operators.arguments import only_scaled, raw, true, widened
from ada_loss.torch.operators.registry import implements
from ada_loss.torch.operators.results import rounded, rounded_late
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import Shifts, combined, floor_power_of_two


@implements("decides", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matrix_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The factor applies to the product in float32."""
    found = only_scaled((0, 1), args, kwargs)
    if not found or len(args) != 2 or kwargs:
        return NotImplemented
    left, right = map(_operand, args)
    product = _product_in_float32(func, raw(left), raw(right))
    gradient, factor = (left, right) if isinstance(left, ScaledTensor) else (right, left)
    choose = partial(_of_product, found[0].shifts, raw(gradient), raw(factor), raw(left).shape[-1])
    return rounded(product, raw(left).dtype, scale_of((left, right)), found[0].shifts, choose)


def _operand(leaf: Any) -> Any:
    return rounded_late(leaf) if isinstance(leaf, ScaledTensor) else leaf


def _product_in_float32(func: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_cuda and left.dtype == torch.float16 and left.dim() > 1 < right.dim():
        return func.overloadpacket.dtype(left, right, torch.float32)
    return func(widened(left), widened(right))


@implements("decides", "aten.convolution_backward")
def convolution_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All three gradients are computed in float32; the scale of the input's is that of a product, those of
    the weight's and the bias's that of sums."""
    found = only_scaled((0, 1, 2), args, kwargs)
    if not found or not isinstance(args[0], ScaledTensor):
        return NotImplemented
    gy, x, weight = map(_operand, args[:3])
    groups, transposed = args[9], args[7]
    shape = raw(weight).shape
    fan = shape[1 if transposed else 0] * math.prod(shape[2:]) // (1 if transposed else groups)
    results = func(*map(widened, (gy, x, weight)), *args[3:], **kwargs)
    shifts = gy.shifts
    of_product = partial(_of_product, shifts, gy.scaled_data, raw(weight), fan)
    ways = (
        (raw(x).dtype, [gy, weight], of_product),
        (raw(weight).dtype, [gy, x], shifts.of_sum),
        (raw(weight).dtype, [gy], shifts.of_sum),
    )
    return tuple(
        None if result is None else rounded(result, dtype, scale_of(factors), shifts, choose)
        for result, (dtype, factors, choose) in zip(results, ways, strict=True)
    )


@implements("decides", "aten.mul")
def product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Element by element. The power of two of a single number rides on the scale."""
    left, right = args
    if not isinstance(left, ScaledTensor):
        left, right = right, left
    if isinstance(right, ScaledTensor):
        wide = widened(left) * widened(right)
        dtype = torch.promote_types(left.shown_dtype, right.shown_dtype)
        return rounded(wide, dtype, scale_of(args), left.shifts, left.shifts.of_sum)
    dtype = _dtype_with(left, right)
    if isinstance(right, torch.Tensor) and right.dim():
        wide = widened(left) * widened(right)
        return rounded(wide, dtype, left.scale, left.shifts, left.shifts.of_sum)
    return _times_number(left, right, dtype)


@implements("decides", "aten.div")
def quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By the true value of the second; without rounding to integers."""
    left, right = args
    if kwargs.get("rounding_mode") or not isinstance(left, ScaledTensor):
        return NotImplemented
    dtype = _dtype_with(left, raw(right))
    wide = widened(left) / true(right)
    return rounded(wide, dtype, left.scale, left.shifts, left.shifts.of_sum)


def _times_number(gradient: ScaledTensor, number: Any, dtype: torch.dtype) -> Any:
    data = gradient.scaled_data
    if dtype != gradient.shown_dtype:
        return NotImplemented
    if not gradient.is_rounded:
        return gradient.with_data(data * number)
    if isinstance(number, torch.Tensor):
        wide = number.float()
        power = floor_power_of_two(wide.abs())
        power = torch.where((power > 0) & torch.isfinite(power), power, 1.0)
        product = (widened(gradient) * (wide / power)).to(dtype)
    else:
        mantissa = math.frexp(number)[0]
        power = number / mantissa if mantissa and math.isfinite(number) else 1.0
        product = data * (number / power)
    return ScaledTensor(product, gradient.scale / power, gradient.shifts)


def _dtype_with(gradient: ScaledTensor, other: Any) -> torch.dtype:
    """The dtype of a product of a gradient and anything else."""
    data = gradient.scaled_data
    return torch.result_type(data if gradient.is_rounded else data.to(gradient.shown_dtype), other)


def scale_of(factors: Any) -> torch.Tensor:
    """The scale of a product of these."""
    return combined(factor.scale for factor in factors if isinstance(factor, ScaledTensor))


def _of_product(
    shifts: Shifts,
    gradient: torch.Tensor,
    factor: torch.Tensor,
    fan: int,
    wide: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    return shifts.of_product(wide, scale, gradient, factor, fan)
