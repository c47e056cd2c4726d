"""Activations and arithmetic under every fast provider, sums under `numpy`."""

import chainer
import chainer.functions as F
import numpy as np
import pytest

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import EACH_PROVIDER, WITH_TORCH, assert_rounded_once, in_float64, run

ALL_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = ALL_FLOAT16[np.isfinite(ALL_FLOAT16)]
SHAPES = [(3,), (2, 70000), (5, 4, 33, 31), (0, 3), ()]


def random(rng, *shape):
    return np.asarray(rng.standard_normal(shape).astype(np.float16))


@EACH_PROVIDER
def test_relu_of_every_float16_is_chainers(provider):
    for values in (ALL_FLOAT16, FINITE):
        expected, _ = run(F.relu, [values], None, "chainer")
        actual, _ = run(F.relu, [values], None, provider)
        np.testing.assert_array_equal(actual, expected)


@EACH_PROVIDER
def test_relu_of_a_negative_nan_is_nan(provider):
    values = np.float16([-1, 0, 1])
    values.view(np.uint16)[1] = 0xFE00
    y, _ = run(F.relu, [values], None, provider)
    assert np.isnan(y[1]) and y[0] == 0 and y[2] == 1


@EACH_PROVIDER
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_relu_passes_where_the_output_is_positive(provider, shape):
    rng = np.random.default_rng(0)
    x, gy = random(rng, *shape), random(rng, *shape)
    y, (gx,) = run(F.relu, [x], gy, provider)
    np.testing.assert_array_equal(y, np.where(x > 0, x, 0))
    np.testing.assert_array_equal(gx, np.where(x > 0, gy, 0))
    assert gx.dtype == np.float16


@EACH_PROVIDER
def test_gradient_of_relu_at_zeros_of_either_sign_is_zero(provider):
    x = np.float16([0.0, -0.0])
    for first in ("chainer", provider):
        _, (gx,) = run(lambda x, first=first: relu_under(first, x), [x], np.float16([3, 3]), provider)
        np.testing.assert_array_equal(gx, [0, 0])


def relu_under(provider, x):
    with kernels.using(provider):
        return F.relu(x)


@EACH_PROVIDER
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_gradient_that_is_not_finite_does_not_vanish_in_relu(provider, bad):
    x, gy = np.float16([-1, 1, -1, 1]), np.float16([bad, bad, 2, 3])
    expected, (expected_gx,) = run(F.relu, [x], gy, "chainer")
    actual, (gx,) = run(F.relu, [x], gy, provider)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(gx, expected_gx)
    assert not np.isfinite(gx[:2]).any()


@EACH_PROVIDER
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_in_the_input_of_relu_lets_no_gradient_through(provider, sign):
    x, gy = np.float16([1, np.nan, -1, 2]), np.float16([3, 4, 5, 6])
    x[1] = np.copysign(x[1], np.float16(sign))
    expected, (expected_gx,) = run(F.relu, [x], gy, "chainer")
    y, (gx,) = run(F.relu, [x], gy, provider)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gx, expected_gx)
    np.testing.assert_array_equal(gx, [3, 0, 0, 6])


@EACH_PROVIDER
def test_relu_of_strided_arrays_is_the_same(provider):
    rng = np.random.default_rng(1)
    x, gy = random(rng, 40, 50, 60).T[::2, ::-1], random(rng, 30, 50, 40)
    _, (gx,) = run(F.relu, [x], gy, provider)
    np.testing.assert_array_equal(gx, np.where(x > 0, gy, 0))


OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "+ 3.14": lambda a, b: a + 3.14,
    "* 3.14": lambda a, b: a * 3.14,
}


@EACH_PROVIDER
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_arithmetic_has_the_bits_of_chainers_for_any_float16(provider, name):
    rng = np.random.default_rng(2)
    a, b = rng.permutation(ALL_FLOAT16), rng.permutation(ALL_FLOAT16)
    expected, _ = run(OPERATIONS[name], [a, b], None, "chainer")
    actual, _ = run(OPERATIONS[name], [a, b], None, provider)
    assert actual.dtype == expected.dtype == np.float16
    np.testing.assert_array_equal(actual, expected)


@WITH_TORCH
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_torch_gives_chainers_bits_in_every_type_whatever_is_not_finite(dtype, rng):
    a, b = rng.standard_normal((2, 70, 40)).astype(dtype)
    a[:5], b[::7] = rng.choice([0, -0.0, np.inf, -np.inf, np.nan, 1], (5, 40)), np.inf
    gy = rng.permutation(b)
    for function, inputs in [(F.relu, [a]), *((OPERATIONS[name], [a, b]) for name in "+-*")]:
        expected, expected_gradients = run(function, inputs, gy, "chainer")
        actual, gradients = run(function, inputs, gy, "torch")
        for result, reference in zip([actual, *gradients], [expected, *expected_gradients], strict=True):
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, reference)
    # The gradient of a quotient is not a single operation.
    results = [run(OPERATIONS["/"], [a, b], None, provider)[0] for provider in ("chainer", "torch")]
    np.testing.assert_array_equal(*results)


@WITH_TORCH
@pytest.mark.filterwarnings("error")
def test_torch_leaves_what_it_cannot_have_without_a_copy(rng):
    x = rng.standard_normal((30, 40)).astype(np.float32)
    for array in (np.broadcast_to(x[0], x.shape), x[::-1]):
        y, _ = run(lambda a: F.relu(a + a), [array], None, "torch")
        np.testing.assert_array_equal(y, np.maximum(2 * array, 0))


@EACH_PROVIDER
@pytest.mark.parametrize("name", ["+", "-", "*", "/"])
@pytest.mark.parametrize(
    "shapes", [((4, 1, 5), (3, 1)), ((), (2, 3)), ((70000, 2), (70000, 2)), ((0, 2), (2,))]
)
def test_arithmetic_broadcasts_and_backpropagates_as_chainers_does(provider, name, shapes):
    rng = np.random.default_rng(3)
    inputs = [random(rng, *shape) + np.float16(9) for shape in shapes]
    inputs = [np.asarray(a) for a in inputs]
    gy = random(rng, *np.broadcast_shapes(*shapes))
    expected, expected_gradients = in_float64(OPERATIONS[name], inputs, gy)
    actual, gradients = run(OPERATIONS[name], inputs, gy, provider)
    assert_rounded_once(actual, expected)
    for array, gradient, exact in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.shape == array.shape and gradient.dtype == np.float16
        np.testing.assert_allclose(gradient, exact, rtol=1e-2, atol=1e-2 * np.sqrt(gy.size + 1))


@EACH_PROVIDER
@pytest.mark.parametrize("name", ["+", "*"])
@pytest.mark.filterwarnings("error")
def test_arithmetic_on_a_repeated_array_rounds_once_without_a_warning(provider, name, rng):
    x, b = random(rng, 8, 70, 30), random(rng, 70, 1)
    exact, _ = in_float64(OPERATIONS[name], [x, b], None)
    for inputs in ([x, b], [b, x]):
        actual, _ = run(OPERATIONS[name], inputs, None, provider)
        np.testing.assert_array_equal(actual, exact.astype(np.float16))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, (), 0, -1, (0, 2, 3), (1, 3), (-4, 1)])
def test_sums_are_float64_ones_rounded_once(axis, keepdims):
    rng = np.random.default_rng(4)
    for x in (
        random(rng, 6, 5, 70, 80),
        random(rng, 70, 6, 80, 5).transpose(1, 3, 0, 2),
        random(rng, 0, 5, 3, 2),
    ):
        exact = x.astype(np.float64).sum(axis=axis, keepdims=keepdims)
        magnitude = np.abs(x.astype(np.float64)).sum(axis=axis, keepdims=keepdims)
        y, _ = run(lambda x: F.sum(x, axis, keepdims), [x], None, "numpy")
        assert y.dtype == np.float16
        assert_rounded_once(y, np.asarray(exact), magnitude, x.size)


def test_a_sum_beyond_float16_is_infinite_and_a_nan_stays():
    x = np.full((3, 4), 60000, np.float16)
    x[2, 2] = np.nan
    y, _ = run(lambda x: F.sum(x, 1), [x], None, "numpy")
    assert np.isposinf(y[:2]).all() and np.isnan(y[2])


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1), (900, 1), ()])
def test_the_gradient_of_a_broadcast_is_summed_in_float32(shape):
    # In float16, adding 7 to 16384 would change nothing.
    gy = np.random.default_rng(5).uniform(1, 7, (900, 4)).astype(np.float16)
    _, (gx,) = run(lambda x: F.broadcast_to(x, (900, 4)), [np.ones(shape, np.float16)], gy, "numpy")
    exact = chainer.utils.sum_to(gy.astype(np.float64), shape)
    assert (gx.dtype, gx.shape) == (np.float16, shape)
    np.testing.assert_allclose(gx, exact, rtol=6e-4)
