"""The provider `numpy`: float16 NumPy arrays through float32, where Chainer computes in float16.

Max pooling is here for the wider types too, several times faster than Chainer's and with the same bits. L2
normalization is here for CuPy's float16 too, whose squares overflow there as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chainer
import numpy as np
from chainer.backends import cuda
from chainer.functions.activation.log_softmax import LogSoftmax, LogSoftmaxGrad
from chainer.functions.activation.prelu import PReLUFunctionGrad
from chainer.functions.activation.relu import ReLU, ReLUGrad2
from chainer.functions.activation.sigmoid import Sigmoid, SigmoidGrad
from chainer.functions.activation.softmax import Softmax, _SoftmaxGrad
from chainer.functions.activation.swish import SwishGrad
from chainer.functions.activation.tanh import Tanh, TanhGrad
from chainer.functions.array.get_item import GetItemGrad
from chainer.functions.array.repeat import RepeatGrad
from chainer.functions.connection.convolution_2d import Convolution2DFunction, Convolution2DGradW
from chainer.functions.connection.convolution_nd import ConvolutionND, ConvolutionNDGradW
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND
from chainer.functions.connection.embed_id import EmbedIDGrad
from chainer.functions.connection.linear import LinearFunction, LinearGradData, LinearGradWeight
from chainer.functions.math.basic_math import (
    Add,
    AddConstant,
    Div,
    DivGrad,
    Mul,
    MulConstant,
    PowVarVarGrad,
    Sub,
)
from chainer.functions.math.matmul import MatMul
from chainer.functions.math.matmul import _matmul as chainers_matmul
from chainer.functions.math.maximum import MaximumGrad
from chainer.functions.math.minimum import MinimumGrad
from chainer.functions.math.sum import Sum, SumTo
from chainer.functions.normalization.batch_normalization import GeneralBatchNormalizationImpl
from chainer.functions.normalization.group_normalization import _ScaleShiftGrad
from chainer.functions.normalization.l2_normalization import NormalizeL2
from chainer.functions.pooling.average_pooling_2d import AveragePooling2D, AveragePooling2DGrad
from chainer.functions.pooling.max_pooling_nd import MaxPoolingND, MaxPoolingNDGrad
from chainer.utils.conv import get_conv_outsize

from ada_loss.arrays.casting import to_float16, to_float32
from ada_loss.chainer.kernels import convolution, elementwise, linear, normalization, pooling
from ada_loss.chainer.kernels.convolution import as_float32
from ada_loss.chainer.kernels.dispatch import Hook, Kernel
from ada_loss.chainer.kernels.patches import Geometry

Arrays = tuple[Any, ...]
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))


def is_float16(array: Any) -> bool:
    """Whether it is a NumPy array of float16."""
    return isinstance(array, np.ndarray) and array.dtype == np.float16


def _is_float16_anywhere(array: Any) -> bool:
    """Whether it is a NumPy or CuPy array of float16."""
    return isinstance(array, (np.ndarray, cuda.ndarray)) and array.dtype == np.float16


def takes(leading: Any, *others: Any) -> bool:
    """Whether the first is a float16 NumPy array, which decides the type of the result, and the others are
    NumPy arrays of float16 or float32."""
    return is_float16(leading) and all(isinstance(a, np.ndarray) and a.dtype in _FLOATS for a in others)


def geometry_of(node: Any, kernel: tuple[int, int]) -> Geometry:
    """Geometry of a convolution's, its weight gradient's or a deconvolution's node."""
    stride, pad, dilation = (node.sy, node.sx), (node.ph, node.pw), (node.dy, node.dx)
    return Geometry(kernel, stride, pad, dilation, node.groups)


def _convolution(node: Any, inputs: Arrays) -> Arrays | None:
    if node.cudnn_fast or not takes(*inputs):
        return None
    x, W, b = inputs if len(inputs) == 3 else (*inputs, None)
    node._check_input_layouts_all_standard()
    node.retain_inputs((0, 1))
    geometry, out_size = geometry_of(node, W.shape[2:]), node._get_out_size(x.shape, W.shape)
    return (convolution.convolve(x, W, b, geometry, out_size),)


def _convolution_grad_weight(node: Any, inputs: Arrays) -> Arrays | None:
    x, gy = inputs
    if node.W_dtype not in _FLOATS or not (takes(x, gy) or takes(gy, x)):
        return None
    node.retain_inputs((0, 1))
    geometry = geometry_of(node, (node.kh, node.kw))
    return (convolution.convolve_grad_weight(x, gy, geometry, node.W_dtype),)


def _deconvolution(node: Any, inputs: Arrays) -> Arrays | None:
    if not takes(*inputs):
        return None
    x, W, b = inputs if len(inputs) == 3 else (*inputs, None)
    node.retain_inputs((0, 1))
    node._calc_out_size(x.shape, W.shape)
    geometry = geometry_of(node, W.shape[2:])
    return (convolution.convolve_grad_input(x, W, b, geometry, (node.outh, node.outw)),)


def _linear(node: Any, inputs: Arrays) -> Arrays | None:
    if not takes(*inputs):
        return None
    x, W, b = inputs if len(inputs) == 3 else (*inputs, None)
    _retain_for_linear(node)
    return (linear.linear(x, W, b),)


def _linear_grad_data(node: Any, inputs: Arrays) -> Arrays | None:
    W, gy = inputs
    if not takes(gy, W):
        return None
    _retain_for_linear(node)
    return (linear.linear_grad_data(W, gy),)


def _linear_grad_weight(node: Any, inputs: Arrays) -> Arrays | None:
    x, gy = inputs
    if node._w_dtype not in _FLOATS or not (takes(x, gy) or takes(gy, x)):
        return None
    _retain_for_linear(node)
    return (linear.linear_grad_weight(x, gy, node._w_dtype),)


def _retain_for_linear(node: Any) -> None:
    node._config_use_ideep = chainer.config.use_ideep
    node.retain_inputs((0, 1))


def _relu(node: Any, inputs: Arrays) -> Arrays | None:
    (x,) = inputs
    y = elementwise.relu(x) if is_float16(x) else None
    if y is None:
        return None
    node.retain_outputs((0,))
    return (y,)


def _relu_grad(node: Any, inputs: Arrays) -> Arrays | None:
    (gy,) = inputs
    gx = elementwise.relu_grad(node.b, gy) if is_float16(gy) and is_float16(node.b) else None
    return None if gx is None else (gx,)


def _max_pooling(node: Any, inputs: Arrays) -> Arrays | None:
    (x,) = inputs
    if not isinstance(x, np.ndarray) or node.return_indices:
        return None
    window = pooling.Window(node.ksize, node.stride, node.pad)
    out_size = tuple(map(get_conv_outsize, x.shape[2:], *_each(window), [node.cover_all] * node.ndim))
    result = pooling.max_pool(x, window, out_size)
    if result is None:
        return None
    node._in_shape, node._in_dtype = x.shape, x.dtype
    y, node.indexes = result
    return (y,)


def _each(window: pooling.Window) -> tuple[tuple[int, ...], ...]:
    return window.size, window.stride, window.pad


def _max_pooling_grad(node: Any, inputs: Arrays) -> Arrays | None:
    forward = node.func
    (gy,) = inputs
    if not isinstance(gy, np.ndarray) or gy.dtype != forward._in_dtype:
        return None
    window = pooling.Window(forward.ksize, forward.stride, forward.pad)
    return (pooling.max_pool_grad(gy, forward.indexes, window, forward._in_shape),)


def _sum(node: Any, inputs: Arrays) -> Arrays | None:
    (x,) = inputs
    if not is_float16(x):
        return None
    return (elementwise.total(x, node.axis, node.keepdims),)


def _sum_to(node: Any, inputs: Arrays) -> Arrays | None:
    (x,) = inputs
    if not is_float16(x) or x.shape == node._shape:
        return None
    lead = x.ndim - len(node._shape)
    ones = tuple(lead + axis for axis, size in enumerate(node._shape) if size == 1)
    return (elementwise.total(x, (*range(lead), *ones), keepdims=True).reshape(node._shape),)


def _arithmetic(function: Callable[..., np.ndarray], retained: tuple[int, ...] = ()) -> Kernel:
    """A kernel for an element-wise operation on two variables."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        if not all(map(is_float16, inputs)):
            return None
        if retained:
            node.retain_inputs(retained)
        return (elementwise.in_float32(function, *inputs),)

    return kernel


def _with_constant(function: Callable[..., np.ndarray]) -> Kernel:
    """A kernel for an element-wise operation on a variable and a number, which Chainer rounds to float16."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        (x,) = inputs
        if not is_float16(x):
            return None
        value = np.float32(np.float16(node.value))
        return (elementwise.in_float32(lambda part: function(part, value), x),)

    return kernel


def _through_float32(name: str) -> Kernel:
    """A kernel that has Chainer's own method of this name compute in float32; results are float16."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        if not takes(*inputs):
            return None
        return tuple(map(to_float16, getattr(node, name)(tuple(map(as_float32, inputs)))))

    return kernel


def _adding_in_float32(name: str) -> Kernel:
    """A kernel that has Chainer's own method of this name add up in float32 the float16 arrays among its
    inputs; results are float16. In float16 a sum of equal numbers ends at the 2048th."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        if not any(map(is_float16, inputs)):
            return None
        return tuple(map(to_float16, getattr(node, name)(tuple(map(as_float32, inputs)))))

    return kernel


def _get_item_grad(node: Any, inputs: Arrays) -> Arrays | None:
    # Only arrays of indexes can name an element more than once.
    if not any(isinstance(index, (np.ndarray, list)) for index in node.slices):
        return None
    return _adding_in_float32("forward")(node, inputs)


def _convolution_nd_grad_weight(node: Any, inputs: Arrays) -> Arrays | None:
    x, gy = inputs
    if not (takes(x, gy) or takes(gy, x)):
        return None
    return node.forward((as_float32(x), as_float32(gy)))


def _matmul(node: Any, inputs: Arrays) -> Arrays | None:
    a, b = inputs
    if not (takes(a, b) or takes(b, a)):
        return None
    node.retain_inputs((0, 1))
    y = np.asarray(chainers_matmul(as_float32(a), as_float32(b), node.transa, node.transb, node.transc))
    dtype = np.dtype(node.dtype or np.result_type(a.dtype, b.dtype))
    return (to_float16(y) if dtype == np.float16 else y.astype(dtype, copy=False),)


def _normalize(node: Any, inputs: Arrays) -> Arrays | None:
    (x,) = inputs
    if not _is_float16_anywhere(x):
        return None
    node.retain_inputs((0,))
    return (normalization.l2_normalize(x, node.axis, node.eps),)


def _normalize_grad(node: Any, indexes: tuple[int, ...], grad_outputs: Arrays) -> Arrays | None:
    (x,), (gy,) = node.get_retained_inputs(), grad_outputs
    arrays = x.array, gy.array
    if chainer.config.enable_backprop or not all(map(_is_float16_anywhere, arrays)):
        return None
    gx = normalization.l2_normalize_grad(*arrays, node.axis, node.eps)
    return (chainer.Variable(gx, requires_grad=False),)


def _batch_normalization(
    implementation: Any, *, x: Any, gamma: Any, beta: Any, **others: Any
) -> tuple[Any, ...] | None:
    if not takes(x, gamma, beta):
        return None
    y, *rest = implementation.forward(
        x=to_float32(x), gamma=as_float32(gamma), beta=as_float32(beta), **others
    )
    return (to_float16(y), *rest)


def _batch_normalization_grad(
    implementation: Any, axis: Any, gamma: Any, gy: Any, x: Any, *others: Any
) -> tuple[Any, ...] | None:
    if not takes(x, gamma, gy):
        return None
    wide = as_float32(gamma), as_float32(gy), to_float32(x)
    gx, layout, ggamma, gbeta = implementation.backward(axis, *wide, *others)
    return to_float16(gx), layout, ggamma.astype(gamma.dtype), gbeta.astype(gamma.dtype)


KERNELS: dict[Hook, Kernel] = {
    (Convolution2DFunction, "forward_cpu"): _convolution,
    (Convolution2DGradW, "forward_cpu"): _convolution_grad_weight,
    (Deconvolution2DFunction, "forward_cpu"): _deconvolution,
    (LinearFunction, "forward"): _linear,
    (LinearGradData, "forward"): _linear_grad_data,
    (LinearGradWeight, "forward"): _linear_grad_weight,
    (ConvolutionND, "forward"): _through_float32("forward"),
    (ConvolutionNDGradW, "forward"): _convolution_nd_grad_weight,
    (DeconvolutionND, "forward"): _through_float32("forward"),
    (MatMul, "forward"): _matmul,
    (ReLU, "forward_cpu"): _relu,
    (ReLUGrad2, "forward_cpu"): _relu_grad,
    (Sigmoid, "forward_cpu"): _through_float32("forward_cpu"),
    (SigmoidGrad, "forward_cpu"): _through_float32("forward_cpu"),
    (Tanh, "forward_cpu"): _through_float32("forward_cpu"),
    (TanhGrad, "forward_cpu"): _through_float32("forward_cpu"),
    (Softmax, "forward"): _through_float32("forward"),
    (_SoftmaxGrad, "forward"): _through_float32("forward"),
    (LogSoftmax, "forward"): _through_float32("forward"),
    (LogSoftmaxGrad, "forward"): _through_float32("forward"),
    (EmbedIDGrad, "forward"): _adding_in_float32("forward"),
    (GetItemGrad, "forward"): _get_item_grad,
    (RepeatGrad, "forward"): _adding_in_float32("forward"),
    (PReLUFunctionGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (SwishGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (_ScaleShiftGrad, "forward"): _adding_in_float32("forward"),
    (DivGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (PowVarVarGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (MaximumGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (MinimumGrad, "forward_cpu"): _adding_in_float32("forward_cpu"),
    (MaxPoolingND, "forward_cpu"): _max_pooling,
    (MaxPoolingNDGrad, "forward_cpu"): _max_pooling_grad,
    (AveragePooling2D, "forward_cpu"): _through_float32("forward_cpu"),
    (AveragePooling2DGrad, "forward_cpu"): _through_float32("forward_cpu"),
    (GeneralBatchNormalizationImpl, "forward"): _batch_normalization,
    (GeneralBatchNormalizationImpl, "backward"): _batch_normalization_grad,
    (NormalizeL2, "forward"): _normalize,
    (NormalizeL2, "backward"): _normalize_grad,
    (Sum, "forward"): _sum,
    (SumTo, "forward"): _sum_to,
    (Add, "forward"): _arithmetic(np.add),
    (Sub, "forward"): _arithmetic(np.subtract),
    (Mul, "forward"): _arithmetic(np.multiply, retained=(0, 1)),
    (Div, "forward"): _arithmetic(np.divide, retained=(0, 1)),
    (AddConstant, "forward"): _with_constant(np.add),
    (MulConstant, "forward"): _with_constant(np.multiply),
}
