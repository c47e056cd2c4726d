"""A histogram of magnitudes tells for every scale what the array itself would tell, element by element."""

import math

import numpy as np
import pytest

from ada_loss.core.formats import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32
from ada_loss.core.histogram import CHUNK, Histogram, merge

TYPES = (np.float16, np.float32, np.float64)


def wild(rng, size, dtype):
    """Numbers of every magnitude that the type has, both signs, zeros, subnormals, infinities and NaNs."""
    bits = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), size, dtype=f"u{np.dtype(dtype).itemsize}")
    values = bits.view(dtype).copy()
    values[rng.random(size) < 0.1] = 0
    values[rng.random(size) < 0.05] = -0.0
    values[rng.random(size) < 0.02] = np.inf
    tiny = rng.random(size) < 0.1
    values[tiny] = np.finfo(dtype).smallest_subnormal * rng.integers(1, 1000, tiny.sum()).astype(dtype)
    return values


def gradients(rng, size=5000):
    """As gradients are: spread over many powers of two, many of them zero."""
    values = np.exp2(rng.normal(-18, 6, size)) * rng.choice([-1.0, 1.0], size)
    values[rng.random(size) < 0.3] = 0
    return values


def magnitudes(values):
    """Of the elements that are finite and not zero, in float64."""
    values = np.abs(values[np.isfinite(values)].astype(np.float64))
    return values[values > 0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [0, 1, 7, CHUNK + 3])
def test_every_bin_holds_the_elements_of_its_power_of_two(rng, dtype, size):
    values = wild(rng, size, dtype)
    found = Histogram.of(values)
    present = magnitudes(values)
    exponents = np.frexp(present)[1] - 1
    for place, count in enumerate(found.counts, found.lowest):
        assert count == np.sum(exponents == place)
    assert found.nonzero == present.size
    assert found.zeros == np.sum(values == 0)
    assert found.nonfinite == np.sum(~np.isfinite(values))
    assert found.size == size
    assert found.largest == (present.max() if present.size else 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_shape_and_memory_order_make_no_difference(rng, dtype):
    values = wild(rng, 6 * 8 * 10, dtype).reshape(6, 8, 10)
    assert Histogram.of(values.transpose(2, 0, 1)) == Histogram.of(values)
    assert Histogram.of(values[::2, ::-1]) == Histogram.of(values[::2].copy())
    assert Histogram.of(values[0, 0, 0]).size == 1


def test_an_exponent_is_taken_out(rng):
    values = gradients(rng).astype(np.float32)
    assert Histogram.of(np.ldexp(values, 13), 13) == Histogram.of(values)
    assert Histogram.of(values, -9) == Histogram.of(np.ldexp(values, 9))
    assert Histogram.of(np.zeros(3, np.float16), 5) == Histogram(zeros=3)


def test_merging_is_counting_together(rng):
    parts = [wild(rng, size, np.float32) for size in (0, 5, 300, 1)] + [np.zeros(4, np.float32)]
    assert merge([Histogram.of(part) for part in parts]) == Histogram.of(np.concatenate(parts))
    assert Histogram.of(parts[1]).merged(Histogram.of(parts[2])) == Histogram.of(np.concatenate(parts[1:3]))
    assert merge([]) == Histogram()


@pytest.mark.parametrize("number_format", [FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("shift", [-30, -7, 0, 1, 12, 40])
def test_shares_at_a_scale_are_those_of_the_scaled_elements(rng, number_format, shift):
    values = gradients(rng)
    scaled = magnitudes(values * 2.0**shift)
    found = Histogram.of(values)
    assert found.underflow(shift, number_format) == np.mean(scaled < number_format.smallest_subnormal)
    assert found.imprecision(shift, number_format) == np.mean(scaled < number_format.smallest_normal)
    above = np.mean(scaled > number_format.max)
    assert found.overflows(shift, number_format) == (above > 0)
    bound = np.mean(scaled >= 2.0 ** math.floor(math.log2(number_format.max)))
    assert (found.overflow(shift, number_format) > 0) == (above > 0)
    assert found.overflow(shift, number_format) <= above <= bound


def test_what_a_scale_zeroes_in_float16_is_counted_as_underflow(rng):
    values = gradients(rng).astype(np.float32)
    for shift in (-12, 0, 5):
        gone = np.mean((values * np.float32(2.0**shift)).astype(np.float16)[values != 0] == 0)
        # Rounding to nearest saves the upper half of the last power of two below the smallest number.
        assert Histogram.of(values).underflow(shift + 1) <= gone <= Histogram.of(values).underflow(shift)


def test_zeros_are_no_underflow():
    assert Histogram.of(np.zeros(10, np.float32)).underflow(-100) == 0
    assert Histogram.of(np.array([0, 0, 1.0])).underflow(0) == 0


def test_counts_of_somebody_else_are_trimmed(rng):
    values = gradients(rng).astype(np.float32)
    own = Histogram.of(values)
    counts = [0, 0, *own.counts, 0]
    assert own == Histogram.from_counts(
        own.lowest - 2,
        np.array(counts),
        zeros=np.int64(own.zeros),
        nonfinite=0,
        largest=np.float32(own.largest),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"counts": (0, 1), "largest": 2.0},
        {"counts": (1, 0), "largest": 1.0},
        {"counts": (1,), "largest": 2.0},
        {"counts": (1,), "largest": 0.0},
        {"counts": (1,), "largest": math.inf},
        {"largest": 1.0},
        {"zeros": -1},
        {"counts": (3, -1, 2), "largest": 4.0},
    ],
)
def test_contradictions_are_refused(fields):
    with pytest.raises(ValueError, match="histogram"):
        Histogram(**fields)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, object])
def test_other_types_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match="float32"):
        Histogram.of(np.zeros(3, dtype))


def test_float32_reaches_further_than_float16(rng):
    found = Histogram.of(gradients(rng))
    assert found.underflow(-20, FLOAT16) > 0
    assert found.underflow(-20, FLOAT32) == 0
