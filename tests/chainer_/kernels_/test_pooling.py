"""Max and average pooling under the provider `numpy`."""

import chainer
import chainer.functions as F
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import assert_rounded_once, in_float64, run


@st.composite
def poolings(draw):
    """Arguments of a max pooling over one to three dimensions, and the shape of its input."""
    n = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    arguments = {
        "ksize": each(1, 4),
        "stride": each(1, 4),
        "pad": each(0, 2),
        "cover_all": draw(st.booleans()),
    }
    size = each(1, 9)
    assume(all(p < k for p, k in zip(arguments["pad"], arguments["ksize"], strict=True)))
    assume(all(m + 2 * p >= k for m, p, k in zip(size, arguments["pad"], arguments["ksize"], strict=True)))
    return arguments, (draw(st.integers(1, 3)), draw(st.integers(1, 3)), *size)


def max_pooling(arguments):
    return lambda x: F.max_pooling_nd(x, **arguments)


@given(poolings(), st.sampled_from(["distinct", "tied", "not negative"]), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_max_pooling_takes_the_first_maximum_and_rounds_sums_of_gradients_once(pooling, values, seed):
    arguments, shape = pooling
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float16)
    x = {"distinct": x, "tied": np.round(x), "not negative": np.maximum(x, 0)}[values]
    exact, _ = in_float64(max_pooling(arguments), [x], None)
    gy = rng.standard_normal(exact.shape).astype(np.float16)
    _, (exact_gx,) = in_float64(max_pooling(arguments), [x], gy)
    _, (magnitude,) = in_float64(max_pooling(arguments), [x], np.abs(gy))
    y, (gx,) = run(max_pooling(arguments), [x], gy, "numpy")
    assert y.dtype == gx.dtype == np.float16
    np.testing.assert_array_equal(y, exact)
    assert_rounded_once(gx, exact_gx, magnitude, int(np.prod(arguments["ksize"])))


@given(
    poolings(), st.sampled_from([np.float32, np.float64]), st.booleans(), st.sampled_from([1, np.inf, np.nan])
)
@settings(max_examples=100, deadline=None)
def test_wider_floats_are_pooled_with_chainers_bits(pooling, dtype, tied, special):
    arguments, shape = pooling
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype)
    x = np.round(x) if tied else x
    x[-1, -1, ..., 0] = special
    gy = rng.standard_normal(run(max_pooling(arguments), [x], None, "chainer")[0].shape).astype(dtype)
    gy.ravel()[::7] = special
    expected, (expected_gx,) = run(max_pooling(arguments), [x], gy, "chainer")
    y, (gx,) = run(max_pooling(arguments), [x], gy, "numpy")
    assert y.dtype == gx.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gx, expected_gx)


def test_several_groups_of_images_and_a_strided_input_pool_alike():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 70, 40, 20)).astype(np.float16).transpose(0, 3, 2, 1)
    gy = rng.standard_normal((5, 20, 20, 35)).astype(np.float16)
    y, (gx,) = run(lambda x: F.max_pooling_2d(x, 2), [x], gy, "numpy")
    exact, (exact_gx,) = in_float64(lambda x: F.max_pooling_2d(x, 2), [x], gy)
    np.testing.assert_array_equal(y, exact)
    np.testing.assert_array_equal(gx, exact_gx)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_pooled_as_chainer_pools_it(bad):
    x = np.random.default_rng(1).standard_normal((2, 2, 6, 6)).astype(np.float16)
    x[0, 0, 3, 2] = bad
    gy = np.ones((2, 2, 3, 3), np.float16)
    gy[1, 1, 1, 1] = bad
    expected, (expected_gx,) = run(lambda x: F.max_pooling_2d(x, 2), [x], gy, "chainer")
    y, (gx,) = run(lambda x: F.max_pooling_2d(x, 2), [x], gy, "numpy")
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(gx, expected_gx)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_infinite_gradient_of_overlapping_windows_stays_where_it_belongs(bad):
    x = np.random.default_rng(2).standard_normal((1, 1, 7, 7)).astype(np.float16)
    gy = np.ones((1, 1, 5, 5), np.float16)
    gy[0, 0, 2, 2] = bad

    def pool(x):
        return F.max_pooling_2d(x, 3, stride=1)

    _, (exact,) = in_float64(pool, [x], gy)
    _, (gx,) = run(pool, [x], gy, "numpy")
    np.testing.assert_array_equal(gx, exact)


@pytest.mark.parametrize("first,then", [("numpy", "chainer"), ("chainer", "numpy")])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_provider_can_finish_what_another_began(first, then, dtype):
    x = chainer.Variable(np.random.default_rng(3).standard_normal((2, 3, 6, 6)).astype(dtype))
    with kernels.using(first):
        y = F.max_pooling_2d(x, 2)
    y.grad = gy = np.ones_like(y.array)
    with kernels.using(then):
        y.backward()
    _, (expected,) = in_float64(lambda x: F.max_pooling_2d(x, 2), [x.array], gy)
    np.testing.assert_array_equal(x.grad, expected)


def test_returned_indexes_are_chainers():
    x = np.random.default_rng(4).standard_normal((2, 3, 6, 6)).astype(np.float16)
    results = []
    for name in ("chainer", "numpy"):
        with kernels.using(name):
            y, indexes = F.max_pooling_2d(x, 2, return_indices=True)
        results.append((y.array, indexes, F.upsampling_2d(y, indexes, 2).array))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


def test_max_pooling_backpropagates_twice():
    x = np.random.default_rng(5).standard_normal((2, 3, 7, 7)).astype(np.float16)

    def twice(x):
        y = F.max_pooling_2d(x, 3, stride=2, pad=1)
        (gx,) = chainer.grad([F.sum(y * y)], [x], enable_double_backprop=True)
        return F.sum(gx * gx)

    _, (exact,) = in_float64(twice, [x], np.ones(()))
    _, (actual,) = run(twice, [x], np.ones(()), "numpy")
    np.testing.assert_allclose(actual, exact, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((7, 6),)])
def test_average_pooling_adds_in_float32(arguments):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 3, 7, 6)).astype(np.float16)

    def pool(x):
        return F.average_pooling_2d(x, *arguments)

    exact, _ = in_float64(pool, [x], None)
    gy = rng.standard_normal(exact.shape).astype(np.float16)
    _, (exact_gx,) = in_float64(pool, [x], gy)
    magnitude, (gx_magnitude,) = in_float64(pool, [np.abs(x)], np.abs(gy))
    y, (gx,) = run(pool, [x], gy, "numpy")
    assert y.dtype == gx.dtype == np.float16
    assert_rounded_once(y, exact, magnitude, 43)
    assert_rounded_once(gx, exact_gx, gx_magnitude, 43)
