"""Alignment and addition of scaled gradients."""

import math

import numpy as np
import pytest

from ada_loss.chainer.gradient import Accumulation, ScaledGradient, add, align, shifted


def scaled(array, exponent):
    """A true gradient, as float16 with an exponent."""
    return ScaledGradient(np.ldexp(array, exponent).astype(np.float16), exponent)


@pytest.mark.parametrize("shift", [-200, -30, -1, 0, 1, 30, 200])
def test_shifting_multiplies_by_a_power_of_two_and_rounds_once(rng, shift):
    array = np.ldexp(rng.standard_normal(100), -shift // 2).astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(array.astype(np.float64), shift).astype(np.float32)
    np.testing.assert_array_equal(shifted(array, shift), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::-1],
        lambda a: a[:, ::2],
        lambda a: a[::-3, 1::2].T,
        lambda a: np.broadcast_to(a[:, :1], a.shape),
        lambda a: np.lib.stride_tricks.sliding_window_view(a, 3, 1),
        lambda a: a[:0, ::2],
    ],
)
@pytest.mark.parametrize("shift", [3, 150])
def test_shifting_keeps_how_an_array_lies_in_memory(rng, view, shift):
    array = view(np.ldexp(rng.standard_normal((7, 8)), -shift).astype(np.float32))
    result = shifted(array, shift)
    np.testing.assert_array_equal(result, np.ldexp(array, shift))
    assert result.strides == array.strides or not array.size


def test_shifting_float16_loses_nothing_that_float16_can_hold(rng):
    array = rng.standard_normal(1000).astype(np.float16)
    np.testing.assert_array_equal(shifted(shifted(array, 6), -6), array)
    np.testing.assert_array_equal(shifted(array, -20, np.float32), np.ldexp(array.astype(np.float32), -20))


def test_fan_out_aligns_to_the_largest_safe_exponent(rng):
    gradient = rng.uniform(-0.5, 0.5, 50)
    arrays, exponent = align([scaled(gradient, 3), scaled(gradient, 9), scaled(gradient, 6)])
    assert exponent == 9
    for array in arrays:
        np.testing.assert_allclose(np.ldexp(array.astype(np.float64), -9), gradient, rtol=2e-3)


def test_alignment_falls_to_a_lower_exponent_where_the_sum_would_overflow():
    large, small = ScaledGradient(np.float16([30000.0]), 0), ScaledGradient(np.float16([1.0]), 2)
    arrays, exponent = align([large, small])
    assert exponent == 0
    assert [array.item() for array in arrays] == [30000.0, 0.25]


def test_alignment_raises_no_gradient_to_the_brink_of_overflow():
    # At the larger exponent, 13, the sum would be 50000: whatever adds it up or multiplies it could overflow.
    total = add([ScaledGradient(np.float16([24.5]), 2), ScaledGradient(np.float16([3.0]), 13)])
    assert total.exponent == 13 - 6
    np.testing.assert_allclose(np.ldexp(total.array, -total.exponent), 24.5 / 4 + 3 / 2**13, rtol=1e-3)


def test_alignment_lowers_none_for_headroom():
    total = add([ScaledGradient(np.float16([30000.0]), 3), ScaledGradient(np.float16([20.0]), 3)])
    assert (total.array.item(), total.exponent) == (30016.0, 3)


def test_zeros_do_not_hold_an_exponent_down():
    total = add([ScaledGradient(np.float16([0.0]), -20), ScaledGradient(np.float16([2.0**-20]), 9)])
    assert (total.array.item(), total.exponent) == (2.0**-20, 9)


def test_alignment_goes_below_every_incoming_exponent_if_it_has_to():
    total = add([ScaledGradient(np.float16([60000.0]), 0), ScaledGradient(np.float16([60000.0]), 0)])
    assert total.exponent == -1
    assert total.array.item() == 60000.0


def test_an_overflowed_gradient_stays_visible():
    total = add([ScaledGradient(np.float16([np.inf]), 4), ScaledGradient(np.float16([1.0]), 0)])
    assert not np.isfinite(total.array).any()


def test_addition_modifies_nothing(rng):
    gradients = [scaled(rng.standard_normal(9), exponent) for exponent in (0, 5, 5)]
    before = [gradient.array.copy() for gradient in gradients]
    add(gradients)
    for gradient, array in zip(gradients, before, strict=True):
        np.testing.assert_array_equal(gradient.array, array)


def test_float32_is_added_from_left_to_right_whatever_the_exponents(rng):
    parts = [rng.standard_normal(200).astype(np.float32) for _ in range(5)]
    exponents = [0, 7, -3, 12, 7]
    total = add([ScaledGradient(np.ldexp(part, e), e) for part, e in zip(parts, exponents, strict=True)])
    expected = (((parts[0] + parts[1]) + parts[2]) + parts[3]) + parts[4]
    np.testing.assert_array_equal(np.ldexp(total.array, -total.exponent), expected)


def test_the_sum_of_random_gradients_is_as_good_as_float16_allows(rng):
    gradients = [rng.standard_normal(100) * 10.0**scale for scale in rng.uniform(-6, 0, 4)]
    flying = [scaled(g, 10 - math.frexp(np.abs(g).max())[1]) for g in gradients]
    total = add(flying)
    expected = np.sum(gradients, axis=0)
    np.testing.assert_allclose(
        np.ldexp(total.array.astype(np.float64), -total.exponent),
        expected,
        atol=2e-3 * np.abs(expected).max(),
    )


def test_an_array_without_axes_stays_an_array():
    array = np.asarray(3.0, np.float32)
    assert isinstance(shifted(array, 2), np.ndarray)
    total = add([ScaledGradient(array, 0), ScaledGradient(array, 1)])
    assert isinstance(total.array, np.ndarray)
    assert total.array * 2.0**-total.exponent == 4.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_wide_sum_of_float16_overflows_at_no_exponent(rng, dtype):
    parts = [rng.uniform(0.25, 0.5, 9).astype(np.float16) for _ in range(40)]
    total = ScaledGradient(np.ldexp(parts[0], 16).astype(dtype), 16)
    for exponent, part in enumerate(parts[1:]):
        total = add([total, ScaledGradient(np.ldexp(part, exponent % 3 + 14), exponent % 3 + 14)], wide=True)
        assert total.array.dtype == np.float32
    expected = np.sum([part.astype(np.float64) for part in parts], axis=0)
    np.testing.assert_allclose(np.ldexp(total.array, -total.exponent), expected, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_gradients_of_different_types_are_aligned_within_the_range_of_each(place):
    # As where F.forget returns a float16 result and its cast to float32.
    gradients = [ScaledGradient(np.float16([1000.0]), 0), ScaledGradient(np.float32([1e5]), 20)]
    arrays, exponent = align([gradients[place], gradients[1 - place]])
    assert [np.ldexp(float(array.item()), -exponent) for array in arrays] == [
        np.ldexp(float(g.array.item()), -g.exponent) for g in (gradients[place], gradients[1 - place])
    ]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_peaks_that_are_far_too_large_do_not_make_gradients_vanish(count):
    # With delayed timing they may be those of other gradients, where a step's graph is another one.
    gradients = [ScaledGradient(np.float16([2.0**-10]), 3)] * count
    total = add(gradients, Accumulation(lambda gradients: [1e12] * len(gradients)))
    assert np.ldexp(float(total.array.item()), -total.exponent) == count * 2.0**-13
    largest = [ScaledGradient(np.float16([65504.0]), 3)] * count
    assert np.isfinite(add(largest).array).all()
