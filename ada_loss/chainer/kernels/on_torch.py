"""The provider `torch`: PyTorch's convolutions, oneDNN's on the CPU and cuDNN's on a GPU, on shared memory.

On the CPU float16 is computed in float32, a few images at a time, and rounded once. On a GPU float16 goes
to cuDNN as it is, which multiplies on tensor cores and adds in float32. What PyTorch does not have
(`cover_all`, operands of several types on a GPU) is left to the next kernel.

Batch normalization, ReLU, arithmetic and casts are here for the CPU.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import chainer
import numpy as np
import torch
from chainer.backends import cuda
from chainer.functions.activation.relu import ReLU, ReLUGrad2
from chainer.functions.connection.convolution_2d import Convolution2DFunction, Convolution2DGradW
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.math.basic_math import Add, AddConstant, Div, Mul, MulConstant, Sub
from chainer.functions.normalization.batch_normalization import GeneralBatchNormalizationImpl
from chainer.utils.conv import get_conv_outsize
from torch.nn.grad import conv2d_weight

from ada_loss.arrays.casting import cast, empty_in_order, inverse, memory_order, to_float16, to_float32
from ada_loss.chainer.kernels.convolution import as_float32
from ada_loss.chainer.kernels.dispatch import Hook, Kernel
from ada_loss.chainer.kernels.on_numpy import Arrays, geometry_of, takes
from ada_loss.chainer.kernels.patches import Geometry

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_FLOATS = np.dtype(np.float16), _FLOAT32, _FLOAT64

_CHANNELS_FIRST, _CHANNELS_LAST = (0, 1, 2, 3), (0, 2, 3, 1)
_CACHED_ELEMENTS = 1 << 16
"""oneDNN takes a fifth less where the channels of images are neighbours in memory, but four times as long for
the weights' gradient of images that are too large for a core's cache."""

_IMAGES_ELEMENTS = 1 << 20
"""Elements of input and output that are in float32 at a time."""

if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not live on in a forked child: whoever shares work with them waits for ever.
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def copy(source: np.ndarray, out: np.ndarray) -> bool:
    """Cast a NumPy array into another between float16 and float32, bits as `ada_loss.arrays.casting`.

    False where PyTorch does not take such arrays: read-only ones, strides that run backwards.
    """
    if not source.flags.writeable:
        return False
    try:
        torch.from_numpy(out).copy_(torch.from_numpy(source))
    except ValueError:
        return False
    return True


def _arguments(geometry: Geometry) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
    """Stride, padding, dilation and groups, in PyTorch's order."""
    return geometry.stride, geometry.pad, geometry.dilation, geometry.groups


def _fits(geometry: Geometry, in_size: tuple[int, int], out_size: tuple[int, int]) -> bool:
    """Whether PyTorch's convolution has this output: not so where Chainer's covers all."""
    return all(
        get_conv_outsize(n, k, s, p, d=d) == m
        for n, k, s, p, d, m in zip(
            in_size, geometry.kernel, geometry.stride, geometry.pad, geometry.dilation, out_size, strict=True
        )
    )


def _takes_on_cpu(*arrays: Any) -> bool:
    """Whether these are NumPy arrays, not empty, of one type or of float16 beside float32."""
    if not all(isinstance(a, np.ndarray) and a.size for a in arrays):
        return False
    return {a.dtype for a in arrays} in ({_FLOAT32}, {_FLOAT64}) or takes(*arrays)


def _shared(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, on the same memory where PyTorch can have it."""
    array = np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED", "WRITEABLE"))
    try:
        return torch.from_numpy(array)
    except ValueError:
        # An array is contiguous whatever its stride along an axis of one element, also a negative one, which
        # PyTorch refuses. A copy has strides of its own.
        return torch.from_numpy(array.copy())


def _in_order(array: np.ndarray, axes: tuple[int, ...]) -> torch.Tensor:
    """`_shared`, with these axes in memory from the one with the largest stride on."""
    return _shared(array.transpose(axes)).permute(inverse(axes))


class _Scratch(threading.local):
    """float32 memory that each thread keeps between calls: systems can take longer to hand out fresh memory
    than the casts into it do."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def tensor(self, array: np.ndarray, use: str) -> torch.Tensor:
        """`_shared`, with float16 in float32; that is valid until the next tensor of the same use."""
        if array.dtype != np.float16:
            return _shared(array)
        kept = self._kept.get(use)
        if kept is None or kept.size < array.size:
            kept = self._kept[use] = np.empty(array.size, np.float32)
        return torch.from_numpy(to_float32(array, kept[: array.size].reshape(array.shape)))


_scratch = _Scratch()


def _quickest_order(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The order in memory in which a convolution takes images of one shape and leaves those of the other."""
    fits = max(math.prod(shape[1:]) for shape in shapes) <= _CACHED_ELEMENTS
    return _CHANNELS_LAST if fits else _CHANNELS_FIRST


def _lying(images: np.ndarray, axes: tuple[int, ...], use: str) -> torch.Tensor:
    """`_scratch.tensor`, with these axes in memory from the one with the largest stride on."""
    return _scratch.tensor(images.transpose(axes), use).permute(inverse(axes))


def _images(*arrays: np.ndarray) -> Iterator[slice]:
    """Images to be computed together: all, unless float16 has to be brought to float32."""
    n = len(arrays[0])
    half = any(array.dtype == np.float16 for array in arrays)
    step = max(1, _IMAGES_ELEMENTS * n // sum(array.size for array in arrays)) if half else n
    for start in range(0, n, step):
        yield slice(start, start + step)


def _map_images(
    function: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """A function of images, from x to an array of this shape and of x's type."""
    axes = _quickest_order(x.shape, shape)
    if x.dtype != np.float16:
        return function(_lying(x, axes, "images")).numpy()
    y = empty_in_order(shape, np.float16, axes)
    for images in _images(x, y):
        to_float16(function(_lying(x[images], axes, "images")).numpy(), y[images])
    return y


def _convolution(node: Any, inputs: Arrays) -> Arrays | None:
    x, W, b = inputs if len(inputs) == 3 else (*inputs, None)
    geometry, out_size = geometry_of(node, W.shape[2:]), node._get_out_size(x.shape, W.shape)
    applies = _takes_on_cpu(*inputs) and not node.cudnn_fast and _fits(geometry, x.shape[2:], out_size)
    if not applies:
        return None
    node._check_input_layouts_all_standard()
    node.retain_inputs((0, 1))
    weight, bias = _scratch.tensor(W, "weight"), None if b is None else _scratch.tensor(b, "bias")

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, bias, *_arguments(geometry))

    return (_map_images(convolve, x, (len(x), len(W), *out_size)),)


def _convolution_grad_weight(node: Any, inputs: Arrays) -> Arrays | None:
    x, gy = inputs
    geometry = geometry_of(node, (node.kh, node.kw))
    if not (_takes_on_cpu(x, gy) or _takes_on_cpu(gy, x)) or not _fits(geometry, x.shape[2:], gy.shape[2:]):
        return None
    node.retain_inputs((0, 1))

    axes = _quickest_order(x.shape, gy.shape)

    def gradient(images: slice) -> torch.Tensor:
        inputs, outputs = _lying(x[images], axes, "images"), _lying(gy[images], axes, "gradients")
        return conv2d_weight(inputs, node.W_shape, outputs, *_arguments(geometry)).contiguous()

    gradients = map(gradient, _images(x, gy))
    return (cast(functools.reduce(torch.Tensor.add_, gradients).numpy(), node.W_dtype),)


def _deconvolution(node: Any, inputs: Arrays) -> Arrays | None:
    gy, W, b = inputs if len(inputs) == 3 else (*inputs, None)
    if not _takes_on_cpu(*inputs):
        return None
    node._calc_out_size(gy.shape, W.shape)
    geometry, in_size = geometry_of(node, W.shape[2:]), (node.outh, node.outw)
    if not _fits(geometry, in_size, gy.shape[2:]):
        return None
    node.retain_inputs((0, 1))
    weight, bias = _scratch.tensor(W, "weight"), None if b is None else _scratch.tensor(b, "bias")

    def deconvolve(gy: torch.Tensor) -> torch.Tensor:
        return _transposed(gy, weight, bias, geometry, in_size)

    return (_map_images(deconvolve, gy, (len(gy), W.shape[1] * node.groups, *in_size)),)


def _transposed(
    gy: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, geometry: Geometry, in_size: tuple[int, int]
) -> torch.Tensor:
    """The convolution's input gradient, (images, in channels, *in_size); with a bias, a deconvolution."""
    stride, pad, dilation, groups = _arguments(geometry)
    # Positions at the end that no patch reached, fewer than the stride.
    rest = tuple(n - m + 2 * p for n, m, p in zip(in_size, geometry.extent(gy.shape[2:]), pad, strict=True))
    return torch.nn.functional.conv_transpose2d(gy, W, b, stride, pad, rest, groups, dilation)


def _batch_normalization(
    implementation: Any,
    *,
    axis: tuple[int, ...],
    x: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    decay: float,
    running_mean: Any,
    running_var: Any,
    **others: Any,
) -> tuple[Any, ...] | None:
    by_channel = _normalizes_channels(implementation, axis, x)
    if not by_channel or not _takes_on_cpu(x, gamma, beta) or x.size == gamma.size:
        return None
    samples = x.size // gamma.size
    parameters = _shared(as_float32(gamma)), _shared(as_float32(beta))
    y, mean, unbiased, inv_std = _normalize(_in_order(x, memory_order(x)), *parameters, eps, samples)
    if running_mean is not None:
        running_mean *= decay
        running_mean += (1 - decay) * mean
        running_var *= decay
        running_var += (1 - decay) * unbiased
    var = unbiased * unbiased.dtype.type((samples - 1) / samples)
    return y, others["x_layout"], running_mean, running_var, mean, var, inv_std, None


def _normalizes_channels(implementation: Any, axis: tuple[int, ...], x: Any) -> bool:
    """Whether statistics are those of this process alone, over everything but the second axis."""
    return type(implementation) is GeneralBatchNormalizationImpl and axis == (0, *range(2, x.ndim))


def _normalize(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float, samples: int
) -> Iterator[np.ndarray]:
    """Normalized x, and the mean, unbiased variance and inverse standard deviation of each channel; of
    float16 computed in float32."""
    if x.dtype == torch.float16:
        mean, unbiased = torch.zeros_like(gamma), torch.zeros_like(gamma)
        # With a momentum of 1 the running statistics are those of this batch.
        y, _, inv_std = torch.ops.aten.native_batch_norm(x, gamma, beta, mean, unbiased, True, 1.0, eps)
    else:
        # PyTorch's own is slower, and less exact where the mean is large.
        axes, along = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
        mean = x.mean(axes)
        centred = x - mean.reshape(along)
        var = centred.square().mean(axes)
        unbiased, inv_std = var * (samples / (samples - 1)), torch.rsqrt(var + eps)
        y = centred.mul_((gamma * inv_std).reshape(along)).add_(beta.reshape(along))
    return (result.numpy() for result in (y, mean, unbiased, inv_std))


def _batch_normalization_grad(
    implementation: Any,
    axis: tuple[int, ...],
    gamma: Any,
    gy: Any,
    x: Any,
    layout: Any,
    xp: Any,
    expander: Any,
    mean: Any,
    inv_std: Any,
    eps: float,
    *others: Any,
) -> tuple[Any, ...] | None:
    by_channel = _normalizes_channels(implementation, axis, x)
    if not by_channel or not _takes_on_cpu(x, gamma) or gy.dtype != x.dtype:
        return None
    gamma32, *statistics = (_shared(as_float32(array)) for array in (gamma, mean, inv_std))
    gy, x = (_in_order(array, memory_order(x)) for array in (gy, x))
    gradients = torch.ops.aten.native_batch_norm_backward(
        gy, x, gamma32, None, None, *statistics, True, eps, [True, True, True]
    )
    gx, ggamma, gbeta = (gradient.numpy() for gradient in gradients)
    return gx, None, cast(ggamma, gamma.dtype), cast(gbeta, gamma.dtype)


def _elementwise(
    function: Callable[..., torch.Tensor], arrays: Arrays, dtypes: tuple[np.dtype[Any], ...] = _FLOATS
) -> Arrays | None:
    """A function of NumPy arrays of one of these types, broadcast, with Chainer's bits but for a ReLU's -0:
    float16 is computed in float32 and rounded once."""
    dtype = arrays[0].dtype
    # Of what PyTorch cannot have as it lies, it would take a copy.
    if dtype not in dtypes or not all(
        isinstance(a, np.ndarray) and a.dtype == dtype and a.flags.writeable for a in arrays
    ):
        return None
    try:
        return (function(*map(torch.from_numpy, arrays)).numpy(),)
    except ValueError:
        return None


def _arithmetic(function: Callable[..., torch.Tensor], retained: tuple[int, ...] = ()) -> Kernel:
    """A kernel for an element-wise operation on two variables."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        result = _elementwise(function, inputs)
        if result and retained:
            node.retain_inputs(retained)
        return result

    return kernel


def _with_constant(function: Callable[..., torch.Tensor]) -> Kernel:
    """A kernel for an element-wise operation on a variable and a number, which Chainer rounds to its type."""

    def kernel(node: Any, inputs: Arrays) -> Arrays | None:
        value = inputs[0].dtype.type(node.value).item()
        return _elementwise(lambda x: function(x, value), inputs)

    return kernel


def _relu(node: Any, inputs: Arrays) -> Arrays | None:
    result = _elementwise(torch.relu, inputs)
    if result:
        node.retain_outputs((0,))
    return result


def _relu_grad(node: Any, inputs: Arrays) -> Arrays | None:
    # A product, not a choice, so that what is not finite stays so. Of float16 this would be slower.
    return _elementwise(lambda y, gy: torch.sign(y).mul_(gy), (node.b, *inputs), (_FLOAT32, _FLOAT64))


def _takes_on_gpu(*arrays: Any) -> bool:
    """Whether these are CuPy arrays, not empty, of one type."""
    return all(isinstance(a, cuda.ndarray) and a.size for a in arrays) and len({a.dtype for a in arrays}) == 1


def _on_stream() -> AbstractContextManager[None]:
    """PyTorch works on CuPy's stream."""
    pointer = cuda.cupy.cuda.get_current_stream().ptr
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer)) if pointer else nullcontext()


def _on_gpu(function: Any, *arrays: Any) -> Any:
    """A function of tensors on CuPy arrays, in full float32 precision where they are float32."""
    flags = torch.backends.cudnn.flags(
        enabled=True,
        benchmark=chainer.config.autotune,
        deterministic=chainer.config.cudnn_deterministic,
        allow_tf32=False,
    )
    with torch.cuda.device(arrays[0].device.id), _on_stream(), flags:
        tensors = (torch.from_dlpack(_without_gaps(array)) for array in arrays)
        return cuda.cupy.from_dlpack(function(*tensors).contiguous())


def _without_gaps(array: Any) -> Any:
    """A CuPy array, or a copy of it, whose strides are those of its shape; see `_shared`."""
    array = cuda.cupy.ascontiguousarray(array)
    if min(array.strides, default=0) >= 0:
        return array
    copied = cuda.cupy.empty(array.shape, array.dtype)
    copied[...] = array
    return copied


def _convolution_on_gpu(node: Any, x: Any, W: Any, b: Any) -> Arrays | None:
    operands = (x, W) if b is None else (x, W, b)
    if node.cover_all or not _takes_on_gpu(*operands):
        return None
    arguments = _arguments(geometry_of(node, W.shape[2:]))
    return (_on_gpu(lambda x, W, b=None: torch.nn.functional.conv2d(x, W, b, *arguments), *operands),)


def _convolution_grad_weight_on_gpu(node: Any, x: Any, gy: Any) -> Arrays | None:
    if node.cover_all or not _takes_on_gpu(x, gy) or x.dtype != node.W_dtype:
        return None
    arguments = _arguments(geometry_of(node, (node.kh, node.kw)))
    return (_on_gpu(lambda x, gy: conv2d_weight(x, node.W_shape, gy, *arguments), x, gy),)


def _deconvolution_on_gpu(node: Any, x: Any, W: Any, b: Any) -> Arrays | None:
    geometry, in_size = geometry_of(node, W.shape[2:]), (node.outh, node.outw)
    operands = (x, W) if b is None else (x, W, b)
    if not _takes_on_gpu(*operands) or not _fits(geometry, in_size, x.shape[2:]):
        return None
    return (_on_gpu(lambda x, W, b=None: _transposed(x, W, b, geometry, in_size), *operands),)


KERNELS: dict[Hook, Kernel] = {
    (Convolution2DFunction, "forward_cpu"): _convolution,
    (Convolution2DGradW, "forward_cpu"): _convolution_grad_weight,
    (Deconvolution2DFunction, "forward_cpu"): _deconvolution,
    (GeneralBatchNormalizationImpl, "forward"): _batch_normalization,
    (GeneralBatchNormalizationImpl, "backward"): _batch_normalization_grad,
    (ReLU, "forward_cpu"): _relu,
    (ReLUGrad2, "forward_cpu"): _relu_grad,
    (Add, "forward"): _arithmetic(torch.add),
    (Sub, "forward"): _arithmetic(torch.sub),
    (Mul, "forward"): _arithmetic(torch.mul, retained=(0, 1)),
    (Div, "forward"): _arithmetic(torch.div, retained=(0, 1)),
    (AddConstant, "forward"): _with_constant(torch.add),
    (MulConstant, "forward"): _with_constant(torch.mul),
    (Convolution2DFunction, "_forward_gpu_core"): _convolution_on_gpu,
    (Convolution2DGradW, "_forward_gpu_core"): _convolution_grad_weight_on_gpu,
    (Deconvolution2DFunction, "_forward_gpu_core"): _deconvolution_on_gpu,
}
