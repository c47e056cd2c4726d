import numpy as np
import pytest

from ada_loss.arrays import casting
from ada_loss.arrays.casting import chunks, magnitudes_to_float32, to_float16, to_float32
from ada_loss.chainer import kernels
from chainer_.kernels_.reference import EACH_PROVIDER

pytestmark = EACH_PROVIDER
"""The provider of Chainer's kernels also decides who casts."""

ALL_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.fixture(autouse=True)
def under(provider):
    with kernels.using(provider):
        yield


def numpys_cast(values):
    with np.errstate(all="ignore"):
        return values.astype(np.float16)


def assert_same_float16(actual, expected):
    """Equal bit for bit, but for which NaN a NaN is."""
    assert actual.dtype == expected.dtype == np.float16
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual[~nan].view(np.uint16), expected[~nan].view(np.uint16))


def float32_with_bits(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def test_every_float16_reaches_float32_exactly():
    wide = to_float32(ALL_FLOAT16)
    assert wide.dtype == np.float32
    expected = np.array([float(value) for value in ALL_FLOAT16])
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(ALL_FLOAT16))


@pytest.mark.parametrize("size", [1, 300, 0x7C00])
def test_every_finite_magnitude_reaches_float32_exactly(rng, size):
    bits = rng.permutation(0x7C00)[:size].astype(np.uint16)
    wide = magnitudes_to_float32(bits)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, bits.view(np.float16).astype(np.float64))


def test_every_float16_survives_the_way_to_float32_and_back():
    assert_same_float16(to_float16(to_float32(ALL_FLOAT16)), ALL_FLOAT16)


def test_every_halfway_case_and_its_neighbours_round_to_nearest_even():
    finite = to_float32(ALL_FLOAT16[np.isfinite(ALL_FLOAT16)])
    step = np.uint32(1 << 12)
    for offset in (-1, 0, 1):
        above = float32_with_bits(finite.view(np.uint32) + step + np.uint32(offset % (1 << 32)))
        assert_same_float16(to_float16(above), numpys_cast(above))


def test_halfway_cases_between_subnormals_round_to_nearest_even():
    halves = (np.arange(2049) * 2.0**-25).astype(np.float32)
    for values in (halves, np.nextafter(halves, np.float32(1)), np.nextafter(halves, np.float32(-1))):
        assert_same_float16(to_float16(values), numpys_cast(values))
        assert_same_float16(to_float16(-values), numpys_cast(-values))


def test_any_float32_rounds_as_numpy_rounds_it():
    rng = np.random.default_rng(0)
    values = float32_with_bits(rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32))
    assert_same_float16(to_float16(values), numpys_cast(values))


def test_float32_in_the_range_of_float16_round_as_numpy_rounds_them():
    rng = np.random.default_rng(1)
    bits = rng.integers(100 << 23, 143 << 23, 1 << 20, dtype=np.uint32)
    values = float32_with_bits(bits | rng.integers(0, 2, bits.size, dtype=np.uint32) << np.uint32(31))
    assert_same_float16(to_float16(values), numpys_cast(values))


@pytest.mark.parametrize("size", [1, 5000])
def test_overflow_gives_infinity_and_nan_stays_without_a_warning(size, recwarn):
    values = np.tile(np.float32([65519.99, 65520, -1e5, np.inf, -np.inf, np.nan, 1e-30, -0.0]), size)
    rounded = to_float16(values)[:8]
    np.testing.assert_array_equal(
        rounded, np.float16([65504, np.inf, -np.inf, np.inf, -np.inf, np.nan, 0, 0])
    )
    assert np.signbit(rounded[-1])
    assert not recwarn.list


@pytest.mark.parametrize("low,high", [(65504, 65536), (65536, 131072), (131072, 1e6)])
def test_values_just_too_large_become_infinite_whatever_else_is_cast_with_them(low, high):
    values = np.random.default_rng(5).uniform(low, high, 4000).astype(np.float32)
    assert_same_float16(to_float16(values), numpys_cast(values))
    assert_same_float16(to_float16(-values), numpys_cast(-values))


@pytest.mark.parametrize("view", [np.s_[:], np.s_[:, ::2], np.s_[..., 1:-1, 2:], np.s_[::-1, ..., ::-1]])
@pytest.mark.parametrize("transposed", [False, True])
def test_strided_arrays_are_cast_into_strided_arrays(view, transposed):
    rng = np.random.default_rng(2)
    source = rng.standard_normal((7, 6, 50, 60)).astype(np.float32)[view]
    source = source.transpose(1, 3, 0, 2) if transposed else source
    halves = source.astype(np.float16)
    assert_same_float16(to_float16(source), halves)
    np.testing.assert_array_equal(to_float32(halves.T), halves.T.astype(np.float32))
    for cast, value, dtype in ((to_float16, source, np.float16), (to_float32, halves, np.float32)):
        around = np.full((*source.shape[:-1], source.shape[-1] + 3), 7, dtype)
        assert cast(value, around[..., 1:-2]).base is around
        np.testing.assert_array_equal(around[..., 1:-2], halves)
        assert (around[..., 0] == 7).all() and (around[..., -2:] == 7).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (casting.CHUNK,), (3, casting.CHUNK + 1)])
def test_every_shape_keeps_its_shape_and_order(shape):
    source = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    assert_same_float16(np.asarray(to_float16(source)), np.asarray(source.astype(np.float16)))
    halves = np.asarray(source.astype(np.float16))
    np.testing.assert_array_equal(to_float32(halves), halves.astype(np.float32))


def test_chunks_cover_every_element_once_and_fit_the_cache():
    array = np.arange(40 * 50 * 90).reshape(40, 50, 90)
    for strided in (array, array.T, array[:, ::3], array[:1], np.broadcast_to(array[0, 0], (4000, 90))):
        parts = [parts for parts in chunks(strided, strided + 1)]
        assert all(a.size <= casting.CHUNK and (a + 1 == b).all() for a, b in parts)
        found = np.concatenate([a.ravel() for a, _ in parts])
        np.testing.assert_array_equal(np.sort(found), np.sort(strided, axis=None))


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_results_lie_in_memory_as_what_was_cast(axes):
    source = casting.empty_in_order((40, 5, 70, 30), np.float32, axes)
    source[...] = np.random.default_rng(6).standard_normal(source.shape)
    halves = to_float16(source)
    assert_same_float16(halves, source.astype(np.float16))
    for result in (halves, to_float32(halves)):
        assert casting.memory_order(result) == casting.memory_order(source) == axes
        assert result.transpose(axes).flags.c_contiguous
    assert len(list(chunks(source, halves))) == -(-source.size // casting.CHUNK)


def test_read_only_and_broadcast_arrays_are_cast_without_a_warning(recwarn):
    source = np.random.default_rng(4).standard_normal((30, 50)).astype(np.float32)
    source.flags.writeable = False
    halves = source.astype(np.float16)
    for values in (source, np.broadcast_to(source, (9, *source.shape)), np.broadcast_to(source[0], (50, 50))):
        assert_same_float16(to_float16(values), values.astype(np.float16))
    wide = to_float32(np.broadcast_to(halves, (9, *halves.shape)))
    np.testing.assert_array_equal(wide, np.stack([halves] * 9).astype(np.float32))
    assert not recwarn.list


def test_another_dtype_or_shape_is_refused():
    with pytest.raises(TypeError, match="expected an array of float16, got float64"):
        to_float32(np.zeros(3))
    with pytest.raises(TypeError, match="expected an array of float32, got float16"):
        to_float16(np.zeros(3, np.float16))
    with pytest.raises(TypeError, match=r"expected out to be float16 of shape \(3,\)"):
        to_float16(np.zeros(3, np.float32), np.zeros(4, np.float16))
