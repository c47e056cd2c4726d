import math
import tracemalloc

import numpy as np
import pytest

from ada_loss.statistics import CHUNK, NOTHING, ONE, _summarize_on_device, extremes_by_row, merge, summarize

DTYPES = ["float16", "float32", "float64"]


def spread(shape, dtype, seed, log2_range=(-24, 12), zeros=0.3):
    """Values whose exponents are uniform over `log2_range`, a share `zeros` of them zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.uniform(*log2_range, size=shape)
    x[rng.random(shape) < zeros] = 0
    return x.astype(dtype)


def assert_summary_is_float64s(x, logs=True):
    exact = np.abs(x.astype(np.float64))
    present = exact[exact > 0]
    found = summarize(x, logs=logs)
    assert found.finite
    assert (found.count, found.nonzero) == (x.size, present.size)
    assert (found.largest, found.smallest) == (present.max(), present.min())
    assert found.sum_squares == pytest.approx(np.square(present).sum(), rel=1e-5)
    mean, deviation = found.log_moments
    assert mean == pytest.approx(np.log(present).mean(), rel=1e-6)
    assert deviation == pytest.approx(np.log(present).std(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_summary_equals_a_float64_computation(dtype, size):
    assert_summary_is_float64s(spread(size, dtype, seed=size, zeros=0.3 if size > 2 else 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_layout_are_read_element_by_element(dtype):
    x = spread((5, 300, 47), dtype, seed=1)
    for view in (x.T, x[:, ::2, 1:], x[::-1], x.transpose(1, 0, 2), np.broadcast_to(x[:1], (3, 300, 47))):
        assert_summary_is_float64s(view)


def test_subnormals_count_with_their_exact_value():
    rng = np.random.default_rng(2)
    x = (rng.integers(1, 1024, size=5000) * 2.0**-24).astype(np.float16)
    assert_summary_is_float64s(x)
    assert summarize(np.array([0, 2.0**-24, -(2.0**-14)], np.float16)).smallest == 2.0**-24


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
    found = summarize(-np.zeros(shape, np.float16), logs=True)
    assert (found.finite, found.nonzero, found.count) == (True, 0, math.prod(shape))
    assert (found.largest, found.smallest, found.mean_square, found.log_moments) == (0, 0, 0, (0, 0))


def test_empty_arrays_have_nothing_to_say():
    for dtype in DTYPES:
        assert summarize(np.zeros((3, 0, 2), dtype), logs=True) == NOTHING
    assert NOTHING.mean_square == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_for_devices_finds_the_same(dtype):
    # It is written for any array module, so NumPy can stand in for CuPy.
    bad = spread(100, dtype, seed=9)
    bad[7] = np.nan
    for x in (spread(5000, dtype, seed=8).reshape(50, 100), np.zeros((3, 4), dtype), bad):
        for logs in (False, True):
            found, expected = _summarize_on_device(x, logs), summarize(x, logs=logs)
            assert (found.count, found.nonzero, found.finite) == (
                expected.count,
                expected.nonzero,
                expected.finite,
            )
            assert (found.largest, found.smallest) == (expected.largest, expected.smallest)
            assert found.sum_squares == pytest.approx(expected.sum_squares, rel=1e-5)
            assert found.log_moments == pytest.approx(expected.log_moments, rel=1e-6)


def test_one_is_the_summary_of_a_one():
    assert summarize(np.ones((), np.float32)) == ONE


def test_merging_equals_summarizing_at_once():
    x = spread(5000, np.float32, seed=4)
    parts = [summarize(part, logs=True) for part in (x[:100], np.zeros(7), x[100:4000], x[4000:])]
    whole = summarize(np.concatenate([x, np.zeros(7, np.float32)]), logs=True)
    merged = merge(parts)
    assert (merged.count, merged.nonzero) == (whole.count, whole.nonzero)
    assert (merged.largest, merged.smallest) == (whole.largest, whole.smallest)
    assert merged.sum_squares == pytest.approx(whole.sum_squares)
    assert merged.log_moments == pytest.approx(whole.log_moments)


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


def test_rows_have_their_own_extremes():
    x = spread((6, 200), np.float16, seed=7)
    x[2] = 0
    for row, (low, high) in zip(np.abs(x.astype(np.float64)), extremes_by_row(x), strict=True):
        assert high == row.max()
        assert low == (row[row > 0].min() if row.any() else 0)
