"""The exponent of a gradient that several processes add up."""

import math

import pytest

from ada_loss.core import agreement
from ada_loss.core.formats import FLOAT16

LIMIT = FLOAT16.max / 4


def agreed(*amaxes):
    bids = [agreement.ABSENT if amax is None else agreement.bid(amax, LIMIT) for amax in amaxes]
    return agreement.exponent_of(min(bids))


@pytest.mark.parametrize("amaxes", [(1.0, 1e-20), (3e-8, 0.0, None), (7e10, 1e-3), (65504.0,)])
def test_it_is_the_largest_at_which_no_process_overflows(amaxes):
    exponent, largest = agreed(*amaxes), max(amax for amax in amaxes if amax)
    assert largest * 2.0**exponent <= LIMIT < largest * 2.0 ** (exponent + 1)


@pytest.mark.parametrize("amaxes", [(0.0, 0.0), (None, 0.0), (None, None)])
def test_zeros_and_absent_gradients_leave_it_at_0(amaxes):
    assert agreed(*amaxes) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_forces_no_exponent_but_0(bad):
    assert agreed(bad) == agreed(bad, 1e-9) == agreed(1e9, bad, None) == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_every_process_learns_that_one_has_what_is_not_finite(bad):
    bids = [agreement.bid(amax, LIMIT) for amax in (1e30, bad, 1e-30, 0.0)]
    assert min(bids) == agreement.OVERFLOW and bids.count(agreement.OVERFLOW) == 1


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([(1.0, 3), (1.0, 7)], 7),
        ([(FLOAT16.max, 0), (1.0, 8)], 0),
        ([(0.0, 20), (1.0, 5)], 5),
        ([(0.0, 20), (0.0, 1)], 0),
    ],
)
def test_scaled_gradients_take_the_largest_of_their_exponents_that_is_safe(gradients, expected):
    bids = [agreement.scaled_bids(amax, FLOAT16.max, exponent) for amax, exponent in gradients]
    assert agreement.scaled_exponent(*map(min, zip(*bids, strict=True))) == expected


def test_bids_fit_32_bits():
    for amax in (5e-324, 1.7e308, 0.0, math.inf):
        assert -(2**31) <= agreement.bid(amax, LIMIT) < 2**31
