"""Convolution and deconvolution, forward and both gradients, under every fast provider."""

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer.functions.connection.convolution_2d import Convolution2DFunction, Convolution2DGradW
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ada_loss.arrays.casting import memory_order
from ada_loss.chainer import kernels
from ada_loss.chainer.kernels import patches
from chainer_.kernels_.reference import EACH_PROVIDER, WITH_TORCH, assert_rounded_once, in_float64, run

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """Arguments of a convolution, and shapes of x and W, of any geometry."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    arguments = {
        "stride": draw(st.one_of(st.just((1, 1)), PAIR)),
        "pad": (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        "dilate": draw(st.one_of(st.just((1, 1)), PAIR)),
        "groups": groups,
        "cover_all": draw(st.booleans()),
    }
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    for n, k, p, d in zip(size, kernel, arguments["pad"], arguments["dilate"], strict=True):
        assume(n + 2 * p > (k - 1) * d)
    channels = groups * draw(st.integers(1, 3))
    x_shape = draw(st.integers(0, 4)), channels, *size
    return arguments, x_shape, (groups * draw(st.integers(1, 3)), channels // groups, *kernel)


def convolution(arguments):
    given = {k: v for k, v in arguments.items() if k not in ("stride", "pad", "cover_all")}

    def function(*inputs):
        node = Convolution2DFunction(
            arguments["stride"], arguments["pad"], arguments.get("cover_all", False), **given
        )
        return node.apply(inputs)[0]

    return function


def deconvolution(x_size, arguments):
    given = {k: v for k, v in arguments.items() if k != "cover_all"}
    return lambda *inputs: F.deconvolution_2d(*inputs, outsize=x_size, **given)


DTYPES = st.sampled_from([np.float16, np.float16, np.float32, np.float64])


def random(rng, *shape, dtype=np.float16):
    return rng.standard_normal(shape).astype(dtype)


def check(provider, function, inputs, rng):
    """Output and all gradients are a float64 computation rounded once, given float32 sums, or float64 ones of
    float64."""
    y, _ = in_float64(function, inputs, None)
    gy = random(rng, *y.shape)
    exact, exact_gradients = in_float64(function, inputs, gy)
    magnitude, magnitudes = in_float64(function, [np.abs(a) for a in inputs], np.abs(gy))
    actual, gradients = run(function, inputs, gy, provider)
    terms = inputs[1].size // inputs[1].shape[0] * max(inputs[1].shape)
    assert actual.dtype == inputs[0].dtype
    assert_rounded_once(actual, exact, magnitude, terms)
    for array, gradient, expected, size in zip(inputs, gradients, exact_gradients, magnitudes, strict=True):
        assert gradient.dtype == array.dtype
        assert_rounded_once(gradient, expected, size, max(terms, gy.size))


@EACH_PROVIDER
@given(convolutions(), st.booleans(), DTYPES, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_any_convolution_is_a_float64_one_rounded_once(provider, convolved, has_bias, dtype, seed):
    arguments, x_shape, W_shape = convolved
    rng = np.random.default_rng(seed)
    inputs = [random(rng, *shape, dtype=dtype) for shape in (x_shape, W_shape, W_shape[:1])]
    check(provider, convolution(arguments), inputs if has_bias else inputs[:2], rng)


@EACH_PROVIDER
@given(convolutions(), st.booleans(), DTYPES, st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_any_deconvolution_is_a_float64_one_rounded_once(provider, convolved, has_bias, dtype, seed):
    arguments, x_shape, W_shape = convolved
    rng = np.random.default_rng(seed)
    arguments = {**arguments, "cover_all": False}
    y, _ = in_float64(convolution(arguments), [np.zeros(x_shape), np.zeros(W_shape)], None)
    inputs = [random(rng, *shape, dtype=dtype) for shape in (y.shape, W_shape, x_shape[1:2])]
    check(provider, deconvolution(x_shape[2:], arguments), inputs if has_bias else inputs[:2], rng)


@given(convolutions(), st.integers(50, 3000), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_how_the_work_is_divided_changes_rounding_only(convolved, part, positions, seed):
    arguments, x_shape, W_shape = convolved
    rng = np.random.default_rng(seed)
    inputs = [random(rng, *x_shape), random(rng, *W_shape)]
    with mock.patch.multiple(patches, PART_ELEMENTS=part, _LEAST_POSITIONS=positions):
        check("numpy", convolution(arguments), inputs, rng)


@pytest.mark.parametrize("kernel,pad", [(1, 0), (3, 1), (5, 0)])
def test_an_image_too_large_for_one_part_is_put_together_again(kernel, pad):
    rng = np.random.default_rng(kernel)
    inputs = [random(rng, 2, 6, 90, 70), random(rng, 5, 6, kernel, kernel)]
    with mock.patch.object(patches, "PART_ELEMENTS", 1 << 13):
        check("numpy", convolution({"stride": 1, "pad": pad, "groups": 1}), inputs, rng)


@EACH_PROVIDER
def test_a_float32_weight_gives_results_in_the_type_of_x_and_its_own_gradient_in_float32(provider):
    rng = np.random.default_rng(0)
    x, W = random(rng, 2, 3, 9, 8), rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    for function in (convolution({"stride": 1, "pad": 1}), convolution({"stride": 2, "pad": 1})):
        check(provider, function, [x, W], rng)
    check(
        provider, deconvolution((9, 8), {"stride": (1, 1), "pad": (1, 1)}), [random(rng, 2, 4, 9, 8), W], rng
    )


@EACH_PROVIDER
def test_an_unrounded_weight_gradient_shows_that_sums_are_float32(provider):
    rng = np.random.default_rng(1)
    x, gy = random(rng, 8, 2, 40, 40), random(rng, 8, 3, 40, 40)
    forward = Convolution2DFunction(1, 1)
    with kernels.using(provider):
        (gW,) = Convolution2DGradW(forward, (3, 2, 3, 3), np.dtype(np.float32), None).apply((x, gy))
    with kernels.using("chainer"):
        wide = x.astype(np.float64), gy.astype(np.float64)
        (exact,) = Convolution2DGradW(forward, (3, 2, 3, 3), np.dtype(np.float64), None).apply(wide)
    assert gW.dtype == np.float32
    np.testing.assert_allclose(gW.array, exact.array, atol=1e-5 * float(np.abs(exact.array).max()), rtol=0)


@EACH_PROVIDER
@pytest.mark.parametrize("groups", [1, 3])
def test_inputs_of_any_memory_layout_give_the_same_bits(provider, groups):
    rng = np.random.default_rng(2)
    x, W = random(rng, 4, 6, 11, 13), random(rng, 9, 6 // groups, 3, 3)
    function = convolution({"stride": 1, "pad": 1, "groups": groups})
    gy = random(rng, 4, 9, 11, 13)
    expected, gradients = run(function, [x, W], gy, provider)
    strided = np.ascontiguousarray(x.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2)
    mirrored = np.asfortranarray(W[:, :, ::-1])[:, :, ::-1]
    actual, strided_gradients = run(function, [strided, mirrored], np.asfortranarray(gy), provider)
    np.testing.assert_array_equal(actual, expected)
    for a, b in zip(strided_gradients, gradients, strict=True):
        np.testing.assert_array_equal(a, b)


@WITH_TORCH
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_images_stay_in_the_order_in_memory_that_torch_wants(dtype, rng):
    """Channels last, through what commonly stands between two convolutions and on the way back."""
    images = chainer.Variable(random(rng, 2, 3, 10, 8, dtype=dtype))
    W, gamma, beta = (rng.standard_normal(shape).astype(dtype) for shape in ((6, 3, 3, 3), (6,), (6,)))
    with kernels.using("torch"):
        convolved = F.convolution_2d(images, W, pad=1)
        normalized = F.batch_normalization(convolved, gamma, beta)
        y = F.relu(normalized * 0.5 + convolved)
        last = F.convolution_2d(y, np.ones((2, 6, 3, 3), dtype))
        last.grad = random(rng, *last.shape, dtype=dtype)
        last.backward(retain_grad=True)
    for variable in (convolved, normalized, y, last):
        assert memory_order(variable.array) == (0, 2, 3, 1)
    for variable in (convolved, normalized, y, images):
        assert memory_order(variable.grad) == (0, 2, 3, 1)


@WITH_TORCH
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_images_too_large_for_a_cache_keep_the_channels_first(dtype, rng):
    """In any order they come, with the same results as others."""
    x, W = random(rng, 2, 8, 100, 90, dtype=dtype), random(rng, 4, 8, 3, 3, dtype=dtype)
    function = convolution({"stride": 1, "pad": 1})
    strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    gy = random(rng, 2, 4, 100, 90, dtype=dtype)
    expected, expected_gradients = run(function, [x, W], gy, "torch")
    actual, gradients = run(function, [strided, W], gy, "torch")
    check("torch", function, [strided, W], rng)
    for result, reference in zip([actual, *gradients], [expected, *expected_gradients], strict=True):
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, reference)


@EACH_PROVIDER
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_reaches_every_output_that_sees_it(provider, stride, bad):
    rng = np.random.default_rng(3)
    x, W = random(rng, 2, 2, 8, 8), random(rng, 3, 2, 3, 3)
    gy = random(rng, 2, 3, 8 // stride, 8 // stride)
    function = convolution({"stride": stride, "pad": 1})
    for place in (0, 1):
        inputs = [x.copy(), W.copy()]
        inputs[place][1, 1, 1, 1] = bad
        exact, exact_gradients = in_float64(function, inputs, gy)
        actual, gradients = run(function, inputs, gy, provider)
        for a, e in zip([actual, *gradients], [exact, *exact_gradients], strict=True):
            assert not np.isfinite(a[~np.isfinite(e)]).any()
    bad_gy = gy.copy()
    bad_gy[0, 0, 1, 1] = bad
    _, exact_gradients = in_float64(function, [x, W], bad_gy)
    _, gradients = run(function, [x, W], bad_gy, provider)
    for a, e in zip(gradients, exact_gradients, strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))


@EACH_PROVIDER
def test_overflow_gives_infinity(provider):
    x, W = np.full((1, 2, 4, 4), 300, np.float16), np.full((1, 2, 3, 3), 300, np.float16)
    y, _ = run(convolution({"stride": 1, "pad": 0}), [x, W], None, provider)
    assert np.isposinf(y).all()


@EACH_PROVIDER
def test_double_backpropagation_goes_through_the_kernels_too(provider):
    rng = np.random.default_rng(4)
    x, W = random(rng, 2, 2, 6, 6), random(rng, 3, 2, 3, 3)

    def squared_gradient(x, W, provider):
        x, W = chainer.Variable(x), chainer.Variable(W)
        with kernels.using(provider):
            y = F.convolution_2d(x, W, pad=1)
            (gx,) = chainer.grad([F.sum(y * y)], [x], enable_double_backprop=True)
            F.sum(gx * gx).backward()
        return W.grad

    actual = squared_gradient(x / 16, W / 16, provider)
    exact = squared_gradient((x / 16).astype(np.float64), (W / 16).astype(np.float64), "chainer")
    np.testing.assert_allclose(actual, exact, atol=4e-3 * np.abs(exact).max(), rtol=0)


@EACH_PROVIDER
def test_deconvolution_finds_its_own_output_size(provider):
    rng = np.random.default_rng(5)
    x, W = random(rng, 2, 3, 5, 4), random(rng, 3, 2, 4, 4)
    node = Deconvolution2DFunction(2, 1)
    with kernels.using(provider):
        (y,) = node.apply((x, W))
    assert y.shape == (2, 2, 10, 8) and (node.outh, node.outw) == (10, 8)


@EACH_PROVIDER
def test_results_survive_later_calls_and_those_of_other_threads(provider):
    rng = np.random.default_rng(6)
    function = convolution({"stride": 1, "pad": 1})
    cases = [
        (random(rng, n, 4, 20, 20), random(rng, 5, 4, 3, 3), random(rng, n, 5, 20, 20)) for n in (1, 2, 3, 4)
    ]

    def results(case):
        x, W, gy = case
        y, gradients = run(function, [x, W], gy, provider)
        return y, *gradients

    expected = [[array.copy() for array in results(case)] for case in cases]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(results, cases * 8))
    for case, found in enumerate(actual):
        for a, e in zip(found, expected[case % len(cases)], strict=True):
            np.testing.assert_array_equal(a, e)
