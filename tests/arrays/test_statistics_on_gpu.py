"""Statistics of CuPy arrays; skipped where there is no GPU."""

import numpy as np
import pytest

from ada_loss.arrays.library import library_of
from ada_loss.arrays.library import summarize as deferred_summary
from ada_loss.core.deferred import OnDevice, fetch

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(not cupy.cuda.is_available(), reason="There is no GPU.")

DTYPES = ["float16", "float32", "float64"]
ALL = {"amin": True, "logs": True}


def summarize(array, **flags):
    return fetch([deferred_summary(array, **flags)])[0]


def product_extremes(gy, weight):
    return library_of(gy).product_extremes(gy, weight)


@pytest.fixture
def rng():
    return np.random.default_rng(22)


def assert_same(found, expected):
    assert (found.size, found.nonzero, found.finite) == (expected.size, expected.nonzero, expected.finite)
    assert (found.amax, found.amin) == (expected.amax, expected.amin)
    assert found.sum_squares == pytest.approx(expected.sum_squares, rel=1e-5)
    assert found.sum_logs == pytest.approx(expected.sum_logs, rel=1e-5, abs=1e-5)
    assert found.sum_squared_logs == pytest.approx(expected.sum_squared_logs, rel=1e-5, abs=1e-5)


def sparse(rng, shape, dtype):
    x = rng.standard_normal(shape) * 2.0 ** rng.uniform(-24, 12, shape)
    return (x * (rng.random(shape) < 0.7)).astype(dtype)


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_many_arrays_are_those_on_the_cpu(rng, dtype, own_stream):
    arrays = [sparse(rng, shape, dtype) for shape in [(), (3,), (7, 11), (40, 3, 500), (5_000_001,)]]
    arrays += [arrays[3].T, arrays[3][:, ::2], arrays[4][1:], np.zeros((9, 9), dtype)]
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    with stream:
        deferred = [deferred_summary(cupy.asarray(array), **ALL) for array in arrays]
        assert all(isinstance(each, OnDevice) for each in deferred)
        found = fetch(deferred)
    for array, statistics in zip(arrays, found, strict=True):
        assert_same(statistics, summarize(array, **ALL))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_element_that_is_not_finite_is_seen(rng, dtype, bad):
    x = sparse(rng, 100_000, dtype)
    x[77_777] = bad
    assert not summarize(cupy.asarray(x)).finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_products_are_those_on_the_cpu(rng, dtype):
    gy, weight = sparse(rng, (6, 200), dtype), sparse(rng, (6, 3), np.float16)
    found = fetch([product_extremes(cupy.asarray(gy), cupy.asarray(weight))])
    assert found == fetch([product_extremes(gy, weight)])
