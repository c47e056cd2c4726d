"""L2 normalization under the provider `numpy`, batch normalization under every fast provider."""

from types import SimpleNamespace

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.functions.normalization.batch_normalization import (
    BatchNormalization,
    GeneralBatchNormalizationImpl,
)

from ada_loss.arrays.casting import empty_in_order
from ada_loss.chainer import kernels
from ada_loss.chainer.kernels import normalization
from chainer_.kernels_.reference import EACH_PROVIDER, assert_rounded_once, in_float64, run


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


def test_l2_normalization_takes_arrays_of_another_module_whole(monkeypatch):
    """As it does CuPy's."""
    rng = np.random.default_rng(7)
    x, gy = (1000 * rng.standard_normal((2, 4, 60, 30, 20))).astype(np.float16)
    axis, eps = (1,), 1e-5
    expected = normalization.l2_normalize(x, axis, eps), normalization.l2_normalize_grad(x, gy, axis, eps)
    cupys = SimpleNamespace(empty_like=np.empty_like, sqrt=np.sqrt, square=np.square, where=np.where)
    library = SimpleNamespace(module=cupys, on_host=False, cast=lambda array, dtype: array.astype(dtype))
    monkeypatch.setattr(normalization, "library_of", lambda _: library)
    actual = normalization.l2_normalize(x, axis, eps), normalization.l2_normalize_grad(x, gy, axis, eps)
    assert len(list(normalization._parts(x, axis))) == 1
    for result, reference in zip(actual, expected, strict=True):
        assert np.isfinite(result).all()
        np.testing.assert_array_equal(result, reference)


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
        link.cleargrads()
        variable = chainer.Variable(x)
        y = link(variable)
        y.grad = gy
        y.backward()
    running = link.avg_mean, link.avg_var
    return y.array, variable.grad, link.gamma.grad, link.beta.grad, *running


@EACH_PROVIDER
@pytest.mark.parametrize("link_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 9, 8), (2, 3, 400)])
def test_batch_normalization_is_the_float32_one_rounded(provider, link_dtype, shape):
    rng = np.random.default_rng(2)
    x, gy = rng.standard_normal((2, *shape)).astype(np.float16)
    actual = batch_normalized(link_dtype, provider, x, gy)
    wide = x.astype(np.float32), gy.astype(np.float32)
    expected = batch_normalized(np.float32, "chainer", *wide)
    dtypes = [np.float16, np.float16, *[link_dtype] * 4]
    for result, reference, dtype in zip(actual, expected, dtypes, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(result, reference, rtol=2**-10, atol=2e-3)


@EACH_PROVIDER
@pytest.mark.parametrize("dtype,units", [(np.float16, 2**-10), (np.float32, 2**-18), (np.float64, 2**-45)])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 70, 60), (2, 3, 4, 5, 6)])
def test_batch_normalization_of_a_large_mean_follows_float64(provider, dtype, units, shape):
    rng = np.random.default_rng(3)
    x, gy = rng.standard_normal((2, *shape)).astype(dtype)
    x += 30
    expected = batch_normalized(np.float64, "chainer", x.astype(np.float64), gy.astype(np.float64))
    orders = [tuple(range(x.ndim)), (0, *range(2, x.ndim), 1)]
    # With the channels last Chainer's own code, which runs under numpy, is less exact in float32.
    for axes in orders if provider == "torch" else orders[:1]:
        arrays = [empty_in_order(x.shape, dtype, axes) for _ in range(2)]
        np.copyto(arrays[0], x)
        np.copyto(arrays[1], gy)
        actual = batch_normalized(np.promote_types(dtype, np.float32), provider, *arrays)
        for result, exact in zip(actual, expected, strict=True):
            np.testing.assert_allclose(result, exact, rtol=0, atol=units * np.abs(exact).max())


@EACH_PROVIDER
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_batch_normalization_takes_any_order_in_memory(provider, dtype, rng):
    x, gy = rng.standard_normal((2, 4, 3, 9, 8)).astype(dtype)
    strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for arrays in ((strided, gy), (x, np.asfortranarray(gy)), (strided, strided[::-1]), (x[::-1], x)):
        plain = map(np.ascontiguousarray, arrays)
        expected = batch_normalized(np.float32, provider, *plain)
        actual = batch_normalized(np.float32, provider, *arrays)
        for result, reference in zip(actual, expected, strict=True):
            bound = 16 * np.finfo(dtype).eps * np.abs(reference).max()
            np.testing.assert_allclose(result, reference, rtol=0, atol=bound)


@EACH_PROVIDER
def test_batch_normalization_of_float16_adds_in_float32(provider):
    """In float16 a sum of ones ends at 2048."""
    x = np.random.default_rng(4).standard_normal((8, 2, 50, 50)).astype(np.float16) + np.float16(1)
    _, _, _, gbeta, mean, _ = batch_normalized(np.float32, provider, x, np.ones_like(x))
    np.testing.assert_array_equal(gbeta, [20000, 20000])
    np.testing.assert_allclose(mean, 0.1 * x.astype(np.float64).mean(axis=(0, 2, 3)), rtol=1e-5)


@EACH_PROVIDER
@pytest.mark.parametrize("axis", [None, (0, 1), (0, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_batch_normalization_over_any_axes_backpropagates_as_chainers(provider, axis, dtype):
    rng = np.random.default_rng(5)
    x, gy = rng.standard_normal((2, 4, 3, 6, 5)).astype(dtype)
    kept = tuple(n for i, n in enumerate(x.shape) if i not in (axis or (0, 2, 3)))
    inputs = [x, *rng.standard_normal((2, *kept)).astype(dtype)]
    exact, exact_gradients = in_float64(lambda *a: F.batch_normalization(*a, axis=axis), inputs, gy)
    y, gradients = run(lambda *a: F.batch_normalization(*a, axis=axis), inputs, gy, provider)
    for result, expected in zip([y, *gradients], [exact, *exact_gradients], strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(
            result, expected, rtol=0, atol=8 * np.finfo(dtype).eps * np.abs(expected).max()
        )


@EACH_PROVIDER
@pytest.mark.filterwarnings("ignore:A batch with no more than one sample")
def test_one_sample_is_normalized_as_chainer_does(provider):
    x, gy = np.float32([[3, -4]]), np.float32([[1, 2]])
    expected = batch_normalized(np.float32, "chainer", x, gy)
    actual = batch_normalized(np.float32, provider, x, gy)
    for result, reference in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(result, reference)


@EACH_PROVIDER
def test_statistics_that_a_subclass_gathers_elsewhere_are_used(provider):
    """As ChainerMN does, which averages them over all processes."""

    class Shared(GeneralBatchNormalizationImpl):
        def get_mean_and_var(self, axis, gamma, x, xp, interm_dtype):
            return np.full(3, 2, interm_dtype), np.full(3, 4, interm_dtype)

    x = np.random.default_rng(6).standard_normal((5, 3, 2, 2)).astype(np.float32)
    node = BatchNormalization(eps=0, impl_selector=lambda node, inputs: Shared())
    with kernels.using(provider):
        (y,) = node.apply((x, np.ones(3, np.float32), np.zeros(3, np.float32)))
    np.testing.assert_allclose(y.array, (x - 2) / 2, rtol=1e-6)
