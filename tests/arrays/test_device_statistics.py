"""The kernels for GPUs, without one: NVIDIA's compiler takes them; on the host they find what NumPy finds."""

import numpy as np
import pytest

import cuda_compilers
from ada_loss.arrays import device_statistics
from ada_loss.arrays.device_statistics import MERGE, MOST_BLOCKS, NAMES, SHARE, SOURCE, THREADS
from ada_loss.arrays.on_cupy import CuPy
from ada_loss.arrays.on_numpy import NumPy
from ada_loss.core.deferred import fetch
from ada_loss.core.measurement import UNUSABLE

DTYPES = ["float16", "float32", "float64"]


def summarize(array, **flags):
    """What NumPy finds."""
    return NumPy().summarize(array, **flags).value


@pytest.fixture
def rng():
    return np.random.default_rng(21)


@pytest.fixture(scope="module")
def cubin():
    return cuda_compilers.compiled(SOURCE, "sm_90")


@pytest.mark.parametrize("name", [*NAMES, MERGE])
def test_kernel_is_in_the_machine_code_for_hopper(cubin, name):
    assert f".text.{name}\0".encode() in cubin


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return cuda_compilers.on_host(SOURCE, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def from_kernels(kernels, monkeypatch):
    """Statistics of NumPy arrays by way of the kernels."""
    monkeypatch.setattr(device_statistics, "_kernel", kernels)

    def statistics(array, amin=True, logs=True):
        return fetch([CuPy(np).summarize(array, amin=amin, logs=logs)])[0]

    return statistics


def sparse(rng, shape, dtype, log2_range=(-24, 12)):
    """Values with exponents spread over `log2_range`, some of them zeros of either sign."""
    x = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.uniform(*log2_range, shape)
    return (x * (rng.random(shape) < 0.7)).astype(dtype)


def assert_same(found, expected):
    assert (found.size, found.nonzero, found.finite) == (expected.size, expected.nonzero, True)
    assert (found.amax, found.amin) == (expected.amax, expected.amin)
    assert found.sum_squares == pytest.approx(expected.sum_squares, rel=1e-6)
    assert found.sum_logs == pytest.approx(expected.sum_logs, rel=1e-6)
    assert found.sum_squared_logs == pytest.approx(expected.sum_squared_logs, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, THREADS * 8 + 3, SHARE, 2 * SHARE + 5])
def test_kernels_find_what_numpy_finds(from_kernels, rng, dtype, size):
    x = sparse(rng, size, dtype)
    assert_same(from_kernels(x), summarize(x, amin=True, logs=True))


def test_every_float16_is_read_as_numpy_reads_it(from_kernels):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for part in np.array_split(halves[np.isfinite(halves)], 8):
        assert_same(from_kernels(part), summarize(part, amin=True, logs=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_was_asked_for_is_found(from_kernels, rng, dtype):
    x = sparse(rng, 100, dtype)
    for flags in ({"amin": True, "logs": False}, {"amin": False, "logs": True}):
        assert_same(from_kernels(x, **flags), summarize(x, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, SHARE + 1, -1])
def test_one_element_that_is_not_finite_is_seen(from_kernels, rng, dtype, bad, position):
    x = sparse(rng, 2 * SHARE - 1, dtype)
    x[position] = bad
    assert from_kernels(x) == UNUSABLE


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read_element_by_element(from_kernels, rng, dtype):
    x = sparse(rng, (20, 30, 7), dtype)
    for view in (x.T, x[:, ::2, 1:], x[1:], x.reshape(-1)[1:], x.transpose(1, 0, 2)):
        assert_same(from_kernels(view), summarize(view, amin=True, logs=True))


def test_squares_neither_overflow_nor_vanish(from_kernels, rng):
    x = sparse(rng, 1000, np.float32, log2_range=(-140, 120))
    assert_same(from_kernels(x), summarize(x, amin=True, logs=True))


def test_zeros_have_no_extremes(from_kernels):
    x = -np.zeros(SHARE + 1, np.float16)
    assert from_kernels(x) == summarize(x, amin=True, logs=True)


def test_huge_arrays_are_shared_by_a_bounded_number_of_blocks(monkeypatch):
    launches = []
    monkeypatch.setattr(
        device_statistics, "_kernel", lambda name: lambda grid, *rest: launches.append((name, grid))
    )
    x = np.broadcast_to(np.float32(1), (2 * MOST_BLOCKS * SHARE,))
    monkeypatch.setattr(np, "ascontiguousarray", lambda array: array)
    device_statistics.figures(np, x, logs=False)
    assert launches == [("summarize_float32", (MOST_BLOCKS,)), (MERGE, (1,))]
