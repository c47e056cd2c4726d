"""L2 and batch normalization under the provider `numpy`."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import assert_rounded_once, in_float64, run


@pytest.mark.parametrize("axis", [1, (1, 2), -1, (0, 1)])
@pytest.mark.parametrize("magnitude", [1, 1000, 1e-4])
def test_l2_normalization_and_its_gradient_are_float64_ones_rounded_once(axis, magnitude):
    rng = np.random.default_rng(0)
    x = (magnitude * rng.standard_normal((3, 40, 30, 20))).astype(np.float16)
    gy = rng.standard_normal(x.shape).astype(np.float16)

    def function(x):
        return F.normalize(x, axis=axis)

    exact, (exact_gx,) = in_float64(function, [x], gy)
    y, (gx,) = run(function, [x], gy, "numpy")
    assert y.dtype == gx.dtype == np.float16
    assert_rounded_once(y, exact, np.abs(exact), 50)
    assert_rounded_once(gx, exact_gx, np.abs(exact_gx).max(), 50)


def test_l2_normalization_of_zeros_is_zero_with_the_gradient_divided_by_eps():
    x, gy = np.zeros((2, 3), np.float16), np.float16([[0.25, -0.25, 0], [0, 0.5, 0.125]])
    y, (gx,) = run(F.normalize, [x], gy, "numpy")
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(gx, gy.astype(np.float32) * 1e5, rtol=2**-11)


def test_l2_normalization_backpropagates_twice():
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float16)

    def function(x):
        y = F.normalize(x)
        (gx,) = chainer.grad([F.sum(y * y * y)], [x], enable_double_backprop=True)
        return F.sum(gx * gx)

    _, (exact,) = in_float64(function, [x], np.ones(()))
    _, (actual,) = run(function, [x], np.ones(()), "numpy")
    np.testing.assert_allclose(actual, exact, atol=3e-2 * np.abs(exact).max())


def batch_normalized(link_dtype, provider, x, gy):
    """Everything that a batch normalization link leaves behind: output, gradients, running statistics."""
    with kernels.using(provider), chainer.using_config("dtype", np.dtype(link_dtype)):
        link = L.BatchNormalization(x.shape[1])
        link.gamma.array[...] = np.linspace(0.5, 2, x.shape[1])
        variable = chainer.Variable(x)
        y = link(variable)
        y.grad = gy
        y.backward()
    running = link.avg_mean, link.avg_var
    return y.array, variable.grad, link.gamma.grad, link.beta.grad, *running


@pytest.mark.parametrize("link_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 9, 8)])
def test_batch_normalization_is_the_float32_one_rounded(link_dtype, shape):
    rng = np.random.default_rng(2)
    x, gy = rng.standard_normal((2, *shape)).astype(np.float16)
    actual = batch_normalized(link_dtype, "numpy", x, gy)
    wide = x.astype(np.float32), gy.astype(np.float32)
    expected = batch_normalized(np.float32, "chainer", *wide)
    dtypes = [np.float16, np.float16, *[link_dtype] * 4]
    for result, reference, dtype in zip(actual, expected, dtypes, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(result, reference, rtol=2**-10, atol=2e-3)
