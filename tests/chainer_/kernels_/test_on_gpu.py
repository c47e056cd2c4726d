"""Kernels on CuPy arrays: PyTorch's convolutions, L2 normalization; skipped where there is no GPU."""

import chainer
import chainer.functions as F
import numpy as np
import pytest

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import in_float64

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not cupy.cuda.is_available(), reason="There is no GPU.")

GEOMETRIES = [
    {"stride": 1, "pad": 1},
    {"stride": 2, "pad": 1},
    {"stride": 1, "pad": 2, "dilate": 2},
    {"stride": 3, "pad": 0},
]


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(np.float16, 2e-3), (np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("arguments", GEOMETRIES)
def test_convolution_and_its_gradients_follow_float64_on_the_cpu(arguments, dtype, tolerance, own_stream):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in [(2, 4, 13, 11), (6, 4, 3, 3), (6,)]]

    def function(*inputs):
        return F.convolution_2d(*inputs, **arguments)

    y, _ = in_float64(function, inputs, None)
    gy = rng.standard_normal(y.shape).astype(dtype)
    exact, exact_gradients = in_float64(function, inputs, gy)
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    with stream, kernels.using("torch"):
        variables = [chainer.Variable(cupy.asarray(array)) for array in inputs]
        y = function(*variables)
        y.grad = cupy.asarray(gy)
        y.backward()
    stream.synchronize()
    results = [y.array, *(variable.grad for variable in variables)]
    for actual, expected in zip(results, [exact, *exact_gradients], strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.get(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("groups", [1, 2])
def test_deconvolution_follows_float64_on_the_cpu(groups):
    rng = np.random.default_rng(1)
    shapes = [(2, 4, 7, 5), (4, 6 // groups, 4, 4), (6,)]
    inputs = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]

    def function(*inputs):
        return F.deconvolution_2d(*inputs, stride=2, pad=1, groups=groups)

    exact, _ = in_float64(function, inputs, None)
    with kernels.using("torch"):
        y = function(*map(cupy.asarray, inputs))
    np.testing.assert_allclose(y.array.get(), exact, rtol=0, atol=2e-3 * np.abs(exact).max())


def test_covering_all_is_left_to_chainer():
    x, W = cupy.ones((1, 1, 6, 6), np.float32), cupy.ones((1, 1, 3, 3), np.float32)
    with kernels.using("torch"):
        y = F.convolution_2d(x, W, stride=2, cover_all=True)
    assert y.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("axis", [1, (1, 2), (0, 3)])
def test_l2_normalization_of_features_beyond_256_does_not_overflow(axis):
    rng = np.random.default_rng(2)
    x = (1000 * rng.standard_normal((2, 40, 7, 5))).astype(np.float16)
    gy = rng.standard_normal(x.shape).astype(np.float16)

    def function(x):
        return F.normalize(x, axis=axis)

    exact, (exact_gx,) = in_float64(function, [x], gy)
    variable = chainer.Variable(cupy.asarray(x))
    with kernels.using("numpy"):
        y = function(variable)
        y.grad = cupy.asarray(gy)
        y.backward()
    assert y.dtype == variable.grad.dtype == np.float16
    np.testing.assert_allclose(y.array.get(), exact, rtol=0, atol=1e-3)
    np.testing.assert_allclose(variable.grad.get(), exact_gx, rtol=0, atol=2e-3 * np.abs(exact_gx).max())
