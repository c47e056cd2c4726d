"""A window holds exactly the scales at which the elements themselves neither underflow nor overflow."""

import math

import numpy as np
import pytest

from ada_loss.core.formats import FLOAT8_E4M3, FLOAT16
from ada_loss.core.histogram import Histogram
from ada_loss.core.windows import ANY, Window, find_window, intersect


def suits(values, shift, number_format):
    """What the window promises, asked of every element."""
    scaled = np.abs(values[values != 0].astype(np.float64)) * 2.0**shift
    small = np.mean(scaled < number_format.smallest_subnormal)
    return small <= 1e-3, not np.any(scaled > number_format.max)


@pytest.mark.parametrize("number_format", [FLOAT16, FLOAT8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("spread", [0.5, 3.0, 9.0])
def test_the_ends_are_the_last_scales_that_suit(rng, number_format, spread):
    values = np.exp2(rng.normal(-15, spread, 4000)).astype(np.float32)
    window = find_window(Histogram.of(values), number_format)
    assert suits(values, window.lowest, number_format)[0]
    assert not suits(values, window.lowest - 1, number_format)[0]
    assert suits(values, window.highest, number_format)[1]
    assert not suits(values, window.highest + 1, number_format)[1]


@pytest.mark.parametrize(
    "largest, highest", [(65504.0, 0), (65505.0, -1), (65536.0, -1), (32752.0, 1), (1.0, 15)]
)
def test_the_largest_float16_is_the_limit_exactly(largest, highest):
    assert find_window(Histogram.of(np.array([largest]))).highest == highest


def test_one_element_in_a_thousand_may_underflow():
    values = np.full(2000, 1.0)
    values[:2] = 2.0**-40
    assert find_window(Histogram.of(values)).lowest == -24
    values[2] = 2.0**-40
    assert find_window(Histogram.of(values)).lowest == 16


def test_zeros_suit_every_scale():
    assert find_window(Histogram.of(np.zeros(5))) == ANY
    assert 10**6 in ANY and not ANY.empty


def test_windows_intersect():
    assert intersect([Window(-3, 8), ANY, Window(2, 11)]) == Window(2, 8)
    assert intersect([]) == ANY
    assert intersect([Window(14, 20), Window(-5, 9)]).empty
    assert 2 in Window(2, 8) and 9 not in Window(2, 8) and math.inf not in Window(2, 8)
