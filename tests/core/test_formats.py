import numpy as np
import pytest

from ada_loss.core.formats import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, FloatFormat


@pytest.mark.parametrize("number_format", [FLOAT16, FLOAT32], ids=lambda f: f.name)
def test_ranges_are_those_of_numpy(number_format):
    expected = np.finfo(number_format.name)
    assert number_format.max == float(expected.max)
    assert number_format.smallest_normal == float(expected.smallest_normal)
    assert number_format.smallest_subnormal == float(expected.smallest_subnormal)


def test_ranges_of_formats_that_numpy_lacks():
    assert (BFLOAT16.max, BFLOAT16.smallest_normal, BFLOAT16.smallest_subnormal) == (
        255 * 2.0**120,
        2.0**-126,
        2.0**-133,
    )
    assert (FLOAT8_E4M3.max, FLOAT8_E4M3.smallest_normal, FLOAT8_E4M3.smallest_subnormal) == (
        448.0,
        2.0**-6,
        2.0**-9,
    )
    assert (FLOAT8_E5M2.max, FLOAT8_E5M2.smallest_normal, FLOAT8_E5M2.smallest_subnormal) == (
        57344.0,
        2.0**-14,
        2.0**-16,
    )


def test_double_precision_is_within_reach():
    double = FloatFormat("float64", 11, 52)
    expected = np.finfo(np.float64)
    assert double.max == expected.max
    assert double.smallest_subnormal == expected.smallest_subnormal
