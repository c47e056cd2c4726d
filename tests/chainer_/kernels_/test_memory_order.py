"""Arrays that lie in memory in several orders, as under the kernels torch, meet without changing any bit."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import EACH_PROVIDER, run
from twins import assert_exact

COMBINATIONS = {
    "inception": lambda m, h: F.concat([m.second(h), F.max_pooling_2d(h, 3, 1, 1)]),
    "averages": lambda m, h: F.concat([m.second(h), F.average_pooling_2d(h, 3, 1, 1)]),
    "split": lambda m, h: m.second(h)[:, :4] + F.split_axis(h, 2, axis=1)[1],
    "shuffled": lambda m, h: m.second(h) + F.transpose(h, (0, 1, 3, 2)),
    "reversed": lambda m, h: m.second(h) + h[..., ::-1],
    "three": lambda m, h: m.second(h) + F.max_pooling_2d(h, 3, 1, 1) + h * F.sigmoid(h),
    "reshaped": lambda m, h: F.relu(m.second(h)) + F.reshape(F.reshape(h, (len(h), -1)), h.shape),
}


class Net(chainer.Chain):
    def __init__(self, combine):
        super().__init__(
            first=L.Convolution2D(3, 8, 3, pad=1, initial_bias=0.1), second=L.Convolution2D(8, 8, 3, pad=1)
        )
        self.combine = combine

    def forward(self, x):
        return self.combine(self, self.first(x))


@EACH_PROVIDER
@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_gradients_in_float32_are_those_of_plain_chainer(provider, combine, rng):
    x = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    with kernels.using(provider):
        assert_exact(Net(combine), [x], mixed16=None)


@EACH_PROVIDER
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gradients_of_parameters_lie_as_chainermn_needs_them(provider, dtype, rng):
    x = rng.standard_normal((4, 3, 8, 8)).astype(dtype)
    shapes = [(8, 3, 3, 3), (8, 2, 3, 3), (8,), (5, 8 * 8 * 8), (4, 8, 1, 1)]
    W, V, b, U, T = (chainer.Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
    with kernels.using(provider):
        h = F.relu(F.convolution_2d(x, W, b, pad=1))
        h = F.deconvolution_2d(F.convolution_2d(F.convolution_2d(h, V, pad=1, groups=4), T), T)
        F.sum(F.linear(h, U)).backward()
    assert all(parameter.grad.flags.c_contiguous for parameter in (W, V, b, U, T))


def reversed_axes(array):
    """The same numbers, lying backwards along every axis; contiguous for NumPy along those of one element."""
    backwards = (slice(None, None, -1),) * array.ndim
    return array[backwards].copy()[backwards]


def without_writing(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    """The same numbers behind one byte, as in a file that is read whole."""
    memory = np.frombuffer(bytearray(1) + array.tobytes(), np.uint8)[1:]
    return memory.view(array.dtype).reshape(array.shape)


def in_records(array):
    """The same numbers as a field of records, whose size is no multiple of a number's."""
    records = np.zeros(array.shape, [("number", array.dtype), ("flag", np.int8)])
    records["number"] = array
    return records["number"]


LAYOUTS = [reversed_axes, without_writing, unaligned, in_records, np.asfortranarray]
OPERATIONS = {
    "convolution": (lambda x, W, b: F.convolution_2d(x, W, b), [(2, 3, 4, 5), (4, 3, 1, 1), (4,)]),
    "convolution of strips": (lambda x, W, b: F.convolution_2d(x, W, b), [(1, 1, 1, 9), (1, 1, 1, 3), (1,)]),
    "deconvolution": (lambda x, W, b: F.deconvolution_2d(x, W, b), [(2, 4, 1, 5), (4, 3, 1, 2), (3,)]),
    "batch normalization": (F.batch_normalization, [(4, 3, 1, 16), (3,), (3,)]),
    "linear": (F.linear, [(1, 6), (4, 6), (4,)]),
    "maximum pooling": (lambda x: F.max_pooling_2d(x, 2), [(2, 1, 4, 6)]),
    "average pooling": (lambda x: F.average_pooling_2d(x, 2), [(2, 1, 4, 6)]),
    "normalization": (lambda x: F.normalize(x, axis=1), [(2, 3, 1, 5)]),
    "ReLU": (F.relu, [(2, 1, 7)]),
    "arithmetic": (lambda x, y: 3 * (x + y) * x - y / 2, [(2, 1, 7), (2, 1, 7)]),
    "sum": (lambda x: F.sum(x, axis=0), [(9, 1)]),
}


@EACH_PROVIDER
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize(("function", "shapes"), OPERATIONS.values(), ids=OPERATIONS)
def test_how_arrays_lie_changes_no_result(provider, dtype, lay, function, shapes, rng):
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    gy = rng.standard_normal(function(*inputs).shape).astype(dtype)
    for array in (*inputs, gy):
        np.testing.assert_array_equal(lay(array), array)
    y, gradients = run(function, inputs, gy, provider)
    ours, our_gradients = run(function, [lay(array) for array in inputs], lay(gy), provider)
    tolerance = {np.float16: 2e-3, np.float32: 1e-5}[dtype]
    for actual, expected in zip((ours, *our_gradients), (y, *gradients), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
