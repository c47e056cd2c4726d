import math
import tracemalloc

import numpy as np
import pytest

from ada_loss.arrays.library import amax_of, library_of
from ada_loss.arrays.library import summarize as deferred_summary
from ada_loss.arrays.on_numpy import CHUNK
from ada_loss.core.deferred import Ready, fetch
from ada_loss.core.measurement import EMPTY, ONE, UNUSABLE, merge

DTYPES = ["float16", "float32", "float64"]


def summarize(x, **flags):
    return fetch([deferred_summary(x, **flags)])[0]


def product_extremes(gy, weight):
    return library_of(gy).product_extremes(gy, weight)


def log_moments(found):
    count = max(1, found.nonzero)
    mean = found.sum_logs / count
    return mean, math.sqrt(max(0, found.sum_squared_logs / count - mean**2))


def spread(shape, dtype, seed, log2_range=(-24, 12), zeros=0.3):
    """Values whose exponents are uniform over `log2_range`, a share `zeros` of them zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.uniform(*log2_range, size=shape)
    x[rng.random(shape) < zeros] = 0
    return x.astype(dtype)


def assert_summary_is_float64s(x):
    exact = np.abs(x.astype(np.float64))
    present = exact[exact > 0]
    found = summarize(x, amin=True, logs=True)
    assert found.finite
    assert (found.size, found.nonzero) == (x.size, present.size)
    assert (found.amax, found.amin) == (present.max(), present.min())
    assert found.sum_squares == pytest.approx(np.square(present).sum(), rel=1e-5)
    mean, deviation = log_moments(found)
    assert mean == pytest.approx(np.log(present).mean(), rel=1e-6)
    assert deviation == pytest.approx(np.log(present).std(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_summary_equals_a_float64_computation(dtype, size):
    assert_summary_is_float64s(spread(size, dtype, seed=size, zeros=0.3 if size > 2 else 0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("log2_range", [(-120, 120), (-130, -60), (-60, -40), (40, 60), (-40, 40)])
def test_wide_formats_are_summarized_over_their_whole_range(dtype, log2_range):
    assert_summary_is_float64s(spread(CHUNK + 100, dtype, seed=13, log2_range=log2_range))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_layout_are_read_element_by_element(dtype):
    x = spread((5, 300, 47), dtype, seed=1)
    for view in (x.T, x[:, ::2, 1:], x[::-1], x.transpose(1, 0, 2), np.broadcast_to(x[:1], (3, 300, 47))):
        assert_summary_is_float64s(view)


def test_subnormals_count_with_their_exact_value():
    rng = np.random.default_rng(2)
    x = (rng.integers(1, 1024, size=5000) * 2.0**-24).astype(np.float16)
    assert_summary_is_float64s(x)
    halves = np.array([0, 2.0**-24, -(2.0**-14)], np.float16)
    assert summarize(halves, amin=True).amin == 2.0**-24


def test_squares_neither_overflow_nor_vanish():
    assert summarize(np.full(9, 60000, np.float16)).mean_square == pytest.approx(60000**2, rel=1e-3)
    assert summarize(np.full(9, 1e30, np.float32)).mean_square == pytest.approx(1e60, rel=1e-6)
    assert summarize(np.full(9, 1e-30, np.float32)).mean_square == pytest.approx(1e-60, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, CHUNK + 5, 2 * CHUNK])
def test_one_element_that_is_not_finite_is_seen(dtype, bad, position):
    x = spread(2 * CHUNK + 1, dtype, seed=3)
    x[position] = bad
    assert not summarize(x).finite


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (CHUNK + 1,)])
def test_all_zero_arrays_have_no_extremes(shape):
    found = summarize(-np.zeros(shape, np.float16), amin=True, logs=True)
    assert (found.finite, found.nonzero, found.size) == (True, 0, math.prod(shape))
    assert (found.amax, found.amin, found.mean_square, log_moments(found)) == (0, 0, 0, (0, 0))


def test_empty_arrays_have_nothing_to_say():
    for dtype in DTYPES:
        assert summarize(np.zeros((3, 0, 2), dtype), logs=True) == EMPTY
    assert EMPTY.mean_square == 0


def test_one_is_the_summary_of_a_one():
    assert summarize(np.ones((), np.float32), amin=True) == ONE


def test_what_was_not_asked_for_is_zero():
    found = summarize(spread(1000, np.float16, seed=10))
    assert (found.amin, found.sum_logs, found.sum_squared_logs) == (0, 0, 0)


def test_on_the_host_every_result_is_ready():
    x = spread(100, np.float16, seed=11)
    assert deferred_summary(x) == Ready(summarize(x))


def test_merging_equals_summarizing_at_once():
    x = spread(5000, np.float32, seed=4)
    parts = [summarize(part, amin=True, logs=True) for part in (x[:100], np.zeros(7), x[100:4000], x[4000:])]
    whole = summarize(np.concatenate([x, np.zeros(7, np.float32)]), amin=True, logs=True)
    merged = merge(parts)
    assert (merged.size, merged.nonzero) == (whole.size, whole.nonzero)
    assert (merged.amax, merged.amin) == (whole.amax, whole.amin)
    assert merged.sum_squares == pytest.approx(whole.sum_squares)
    assert log_moments(merged) == pytest.approx(log_moments(whole))


def test_merging_does_not_find_what_was_not_asked_for():
    x = spread(500, np.float16, seed=14)
    merged = merge([summarize(x, amin=True), summarize(np.zeros(3)), summarize(2 * x)])
    assert (merged.amin, merged.sum_logs, merged.sum_squared_logs) == (0, 0, 0)
    assert merged.amax == 2 * np.abs(x).max()


def test_merging_with_what_is_not_finite_leaves_nothing_usable():
    assert merge([summarize(np.ones(3)), summarize(np.array([1.0, np.nan]))]) == UNUSABLE


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude_is_found_in_any_layout(dtype):
    x = spread((5, 300, 7), dtype, seed=15)
    for view in (x, x.T, x[:, ::2, 1:], x[::-1], x[0, 0, 0], np.zeros((2, 0), dtype)):
        assert amax_of(view) == np.abs(view).max(initial=0)
    x[1, 2, 3] = -np.inf
    assert amax_of(x) == np.inf
    x[4, 5, 6] = np.nan
    assert np.isnan(amax_of(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_array_is_left_as_it_was(dtype):
    x = spread(1000, dtype, seed=5)
    before = x.copy()
    summarize(x, logs=True)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_the_arrays_size_is_made(dtype):
    x = spread((64, CHUNK), dtype, seed=6)
    for view in (x, x.T, x[:, ::2]):
        tracemalloc.start()
        summarize(view, logs=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < x.nbytes / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_products_are_those_over_all_pairs_of_a_row(dtype):
    gy, weight = spread((6, 200), dtype, seed=7), spread((6, 3), np.float16, seed=8)
    gy[2] = 0
    weight[4] = 0
    products = np.abs(np.einsum("ri,rj->rij", gy.astype(np.float64), weight.astype(np.float64)))
    low, high = fetch([product_extremes(gy, weight)])[0]
    assert (low, high) == (products[products > 0].min(), products.max())


def test_without_products_their_extremes_are_zero():
    gy, weight = np.ones((2, 3), np.float16), np.ones((2, 4), np.float16)
    gy[0], weight[1] = 0, 0
    nothing = product_extremes(gy, weight), product_extremes(gy[:, :0], weight)
    assert fetch(nothing) == [(0, 0), (0, 0)]
