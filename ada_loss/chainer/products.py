"""Which functions are decision points, and how a chosen shift enters their backward.

A decision point multiplies its output gradient by another of its inputs (a weight, or the other operand of a
matrix product), so its input gradient can be scaled by scaling that input: gx = gy * (W * 2**shift). That
needs no scaled copy of gy, and Chainer's own backward computes it. A cast that leaves float16 on the forward
pass is the other kind: its backward rounds to float16, and the shift is applied before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chainer
import numpy as np
from chainer.functions.array.cast import Cast
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.convolution_nd import ConvolutionND
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND
from chainer.functions.connection.linear import LinearFunction
from chainer.functions.connection.local_convolution_2d import LocalConvolution2DFunction
from chainer.functions.math.basic_math import Mul, MulConstant
from chainer.functions.math.einsum import EinSum, _enumerate_axes
from chainer.functions.math.matmul import BatchMatMul, MatMul
from chainer.functions.math.tensordot import TensorDot
from chainer.functions.noise.simplified_dropconnect import SimplifiedDropconnect

from ada_loss.arrays.library import cast, library_of
from ada_loss.chainer.gradient import shifted
from ada_loss.core.measurement import Factor

_MOST_CARRIED = 60
"""The largest shift that rides on a weight of float32 or wider."""


@dataclass(frozen=True)
class Product:
    """A function whose gradient for input `data` is a sum of products of gy and input `weight`.

    fan: how many products make one element of that gradient at most, from the function and its gy (an array).
    channel_axis: the axis of the weight that runs over gy's channels, None where they share none.
    """

    data: int
    weight: int
    fan: Callable[[Any, Any], int]
    channel_axis: int | None = 0


def _convolution_fan(function: Any, gy: Any) -> int:
    out_channels, _, *kernel = function.inputs[1].shape
    return out_channels // getattr(function, "groups", 1) * math.prod(kernel)


def _deconvolution_fan(function: Any, gy: Any) -> int:
    return math.prod(function.inputs[1].shape[1:])


def _local_convolution_fan(function: Any, gy: Any) -> int:
    out_channels, _, _, _, height, width = function.inputs[1].shape
    return out_channels * -(-height // function.sy) * -(-width // function.sx)


def _linear_fan(function: Any, gy: Any) -> int:
    return function.inputs[1].shape[0]


def _matmul_terms(function: Any, gy: Any) -> int:
    a = function.inputs[0].shape
    return gy.size * (a[-2] if function.transa and len(a) > 1 else a[-1])


def _batch_matmul_terms(function: Any, gy: Any) -> int:
    batch, rows, columns = (*function.inputs[0].shape, 1)[:3]
    return gy.size * (rows if function.transa else columns)


def _tensordot_terms(function: Any, gy: Any) -> int:
    return gy.size * math.prod(function.inputs[0].shape[axis] for axis in function.a_axes[1])


def _einsum_terms(function: Any, gy: Any) -> int:
    sizes: dict[str, int] = {}
    for x, subscripts in zip(function.inputs, function.in_subs.split(","), strict=True):
        for axes, letter in _enumerate_axes(subscripts):
            size = math.prod(x.shape[axes]) if isinstance(axes, slice) else x.shape[axes]
            sizes[letter] = max(size, sizes.get(letter, 0))
    return math.prod(sizes.values())


def _fan_of(terms: int, operand: Any) -> int:
    # Elements that no product meets, as those off a diagonal, make the quotient smaller than one.
    return max(1, terms // max(1, math.prod(operand.shape)))


def _both_operands(terms: Callable[[Any, Any], int]) -> tuple[Product, Product]:
    """The products of a function of two operands; every element takes part in equally many of all `terms`."""

    def fan(operand: int) -> Callable[[Any, Any], int]:
        return lambda function, gy: _fan_of(terms(function, gy), function.inputs[operand])

    return Product(0, 1, fan(0), None), Product(1, 0, fan(1), None)


PRODUCTS: dict[type, tuple[Product, ...]] = {
    LinearFunction: (Product(0, 1, _linear_fan),),
    SimplifiedDropconnect: (Product(0, 1, _linear_fan),),
    Convolution2DFunction: (Product(0, 1, _convolution_fan),),
    ConvolutionND: (Product(0, 1, _convolution_fan),),
    LocalConvolution2DFunction: (Product(0, 1, _local_convolution_fan),),
    Deconvolution2DFunction: (Product(0, 1, _deconvolution_fan, channel_axis=1),),
    DeconvolutionND: (Product(0, 1, _deconvolution_fan, channel_axis=1),),
    MatMul: _both_operands(_matmul_terms),
    BatchMatMul: _both_operands(_batch_matmul_terms),
    TensorDot: _both_operands(_tensordot_terms),
    EinSum: _both_operands(_einsum_terms),
}
"""The decision points, by function class; subclasses inherit."""


def products_of(function: chainer.FunctionNode) -> tuple[Product, ...]:
    """The products of a function's backward, () unless it is a decision point with weights."""
    if isinstance(function, EinSum) and function.in_subs.count(",") != 1:
        # One operand is only rearranged; of three or more, no single one is the weight of another.
        return ()
    cls: Any = type(function)
    return _products_of_class(cls)


@functools.cache
def _products_of_class(cls: Any) -> tuple[Product, ...]:
    return next((PRODUCTS[base] for base in cls.__mro__ if base in PRODUCTS), ())


def is_decision(function: chainer.FunctionNode) -> bool:
    """Whether a shift is chosen at this function, which has run forward."""
    return bool(products_of(function)) or enters_float16(function)


def enters_float16(function: chainer.FunctionNode) -> bool:
    """Whether the function is a cast whose backward rounds to float16."""
    return (
        isinstance(function, Cast)
        and function._in_type == np.float16
        and np.dtype(function.type) != np.float16
    )


def input_gradient(function: Any, product: Product, gy: Any, shift: int, max_weight_shift: int = 0) -> Any:
    """The gradient of input `product.data` times 2**shift, in that input's dtype, from gy, an array.

    max_weight_shift: the largest that the weights carry in float16.
    """
    if shift == 0:
        return backward_arrays(function, (product.data,), (gy,))[0]
    weight, gy = _scaled_operands(weight_of(function, product), gy, shift, max_weight_shift)
    gx = backward_with_weight(function, product, weight, product.data, gy)
    return cast(gx, function.inputs[product.data].dtype)


def backward_with_weight(function: Any, product: Product, weight: Any, target: int, gy: Any) -> Any:
    """The gradient of input `target` as if the function had been given another weight, an array."""
    retained = function.get_retained_inputs()
    place = _place(function, product)
    replaced = (*retained[:place], chainer.Variable(weight, requires_grad=False), *retained[place + 1 :])
    # Chainer's backward reads its weight through this method and nowhere else.
    function.get_retained_inputs = lambda: replaced
    try:
        return backward_arrays(function, (target,), (gy,))[0]
    finally:
        del function.get_retained_inputs


def constant_of(function: Any) -> tuple[float, int] | None:
    """The number that a float16 function multiplies by, as one between 1 and 2 and a power of two; None for
    others, and for a number without such a power."""
    value = _multiplied_by(function) if function.inputs[0].dtype == np.float16 else None
    if not value or not math.isfinite(value):
        return None
    fraction, exponent = math.frexp(value)
    return 2 * fraction, exponent - 1


def _multiplied_by(function: Any) -> float | None:
    """The number, given as such or as an array of one element without a gradient, on the host."""
    if type(function) is MulConstant:
        return float(function.value)
    if type(function) is not Mul:
        return None
    for index, x in enumerate(function.inputs):
        fits = len(x.shape) <= len(function.inputs[1 - index].shape)
        if not x.requires_grad and fits and math.prod(x.shape) == 1:
            array = function.get_retained_inputs()[index].array
            return float(array.item()) if library_of(array).on_host else None
    return None


def gradient_by_constant(constant: tuple[float, int], gy: Any, exponent: int) -> tuple[Any, int]:
    """The gradient of what a function multiplies by a constant, and its exponent, from gy, which carries
    `exponent`: the constant's power of two goes to the exponent, so that no element becomes too small or too
    large."""
    fraction, power = constant
    (gx,) = (gy,) if fraction == 1 else MulConstant(fraction).forward((gy,))
    return gx, exponent - power


def factor_of(function: Any, product: Product, gy: Any) -> Factor:
    """What the function multiplies gy (an array) by, for the gradient of input `product.data`."""
    weight = function.inputs[product.weight].get_variable_or_none()
    return Factor(
        weight_of(function, product),
        product.fan(function, gy),
        product.channel_axis,
        is_parameter=isinstance(weight, chainer.Parameter),
    )


def weight_of(function: Any, product: Product) -> Any:
    """The array that the function multiplies its output gradient by."""
    return function.get_retained_inputs()[_place(function, product)].array


def _place(function: Any, product: Product) -> int:
    return tuple(function._input_indexes_to_retain).index(product.weight)


def backward_arrays(function: Any, targets: tuple[int, ...], gys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Chainer's own backward of a function, on arrays: one or None for each of the inputs `targets`."""
    if not targets:
        return ()
    variables = tuple(None if gy is None else chainer.Variable(gy, requires_grad=False) for gy in gys)
    if type(function).backward_accumulate is not chainer.FunctionNode.backward_accumulate:
        gxs = function.backward_accumulate(targets, variables, (None,) * len(targets))
    else:
        gxs = function.backward(targets, variables)
    if len(gxs) == len(function.inputs):
        gxs = [gxs[index] for index in targets]
    elif len(gxs) != len(targets):
        raise ValueError(f"{function.label} returned {len(gxs)} gradients for {len(targets)} inputs.")
    return tuple(None if gx is None else gx.raw_array for gx in gxs)


def _scaled_operands(weight: Any, gy: Any, shift: int, max_weight_shift: int) -> tuple[Any, Any]:
    """Weight and gy with a product 2**shift times as large: the weight is scaled wherever that is exact.

    On NumPy a float16 weight becomes float32, in which the product is computed anyway. On a GPU, where both
    stay float16, it is scaled up as far as there is `max_weight_shift`; a shift down is the gradient's.
    """
    if weight.dtype != np.float16:
        # Wide formats hold gradients so small that a weight cannot carry the whole shift.
        carried = max(-_MOST_CARRIED, min(shift, _MOST_CARRIED))
        return shifted(weight, carried), shifted(gy, shift - carried)
    if library_of(weight).on_host:
        return shifted(weight, shift, np.float32), gy
    carried = max(0, min(shift, max_weight_shift))
    return shifted(weight, carried), shifted(gy, shift - carried)
