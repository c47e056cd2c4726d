"""The linear function and both gradients under the provider `numpy`."""

from unittest import mock

import chainer.functions as F
import numpy as np
import pytest

from ada_loss.chainer.kernels import linear
from chainer_.kernels_.reference import assert_rounded_once, in_float64, run


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float16)


def check(inputs, rng):
    gy = random(rng, len(inputs[0]), len(inputs[1]))
    exact, exact_gradients = in_float64(F.linear, inputs, gy)
    magnitude, magnitudes = in_float64(F.linear, [np.abs(a) for a in inputs], np.abs(gy))
    actual, gradients = run(F.linear, inputs, gy, "numpy")
    terms = sum(max(a.shape) for a in inputs)
    assert actual.dtype == np.float16
    assert_rounded_once(actual, exact, magnitude, terms)
    for array, gradient, expected, size in zip(inputs, gradients, exact_gradients, magnitudes, strict=True):
        assert gradient.dtype == array.dtype
        assert_rounded_once(gradient, expected, size, terms)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "batch,n_in,n_out", [(1, 1, 1), (5, 70, 30), (64, 3, 1), (1, 300, 200), (0, 4, 3), (2, 4, 0)]
)
def test_products_are_float64_ones_rounded_once(batch, n_in, n_out, has_bias):
    rng = np.random.default_rng(batch)
    inputs = [random(rng, batch, n_in), random(rng, n_out, n_in), random(rng, n_out)]
    check(inputs if has_bias else inputs[:2], rng)


def test_a_float32_weight_gives_results_in_the_type_of_x_and_its_own_gradient_in_float32():
    rng = np.random.default_rng(0)
    check([random(rng, 9, 50), rng.standard_normal((20, 50)).astype(np.float32)], rng)


def test_blocks_of_the_weight_change_rounding_only():
    rng = np.random.default_rng(1)
    inputs = [random(rng, 9, 50), random(rng, 21, 50), random(rng, 21)]
    for elements in (1, 130, 400):
        with mock.patch.object(linear, "_BLOCK_ELEMENTS", elements):
            check(inputs, rng)


def test_strided_matrices_give_the_same_values():
    rng = np.random.default_rng(2)
    wide = random(rng, 12, 100)
    check([wide[::2, ::-1], random(rng, 100, 20).T], rng)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
    rng = np.random.default_rng(3)
    inputs, gy = [random(rng, 4, 6), random(rng, 5, 6)], random(rng, 4, 5)
    inputs[0][1, 2] = gy[2, 3] = bad
    exact, exact_gradients = in_float64(F.linear, inputs, gy)
    actual, gradients = run(F.linear, inputs, gy, "numpy")
    for a, e in zip([actual, *gradients], [exact, *exact_gradients], strict=True):
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))
