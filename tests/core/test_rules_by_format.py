"""The rules choose for any format: what they promise of float16 they promise of float8 and bfloat16."""

import math

import numpy as np
import pytest

from ada_loss.arrays.measuring import measure
from ada_loss.core.config import METHODS, AdaLossConfig
from ada_loss.core.decision import Site
from ada_loss.core.deferred import Ready, fetch
from ada_loss.core.formats import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16
from ada_loss.core.measurement import Factor
from ada_loss.core.policy import ShiftPolicy
from ada_loss.core.rules import FIXED, RULES

FORMATS = pytest.mark.parametrize(
    "number_format", [FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3], ids=lambda each: each.name
)
MEASURING = [name for name, rule in RULES.items() if rule.measures]


def unbounded(method):
    return AdaLossConfig(loss_scale_method=method, scale_upper_bound=None, accum_upper_bound=None)


def layer(rng, number_format):
    """gy and W of a linear layer whose products are spread over more than the format holds."""
    low = math.log2(number_format.smallest_subnormal)
    gy = rng.standard_normal((50, 16)) * 2.0 ** rng.uniform(low - 20, low + 4, (50, 16))
    return gy, rng.standard_normal((16, 8))


def shift_of(method, number_format, gy, weight=None):
    config = unbounded(method)
    (measurement,) = fetch([measure(config, gy, weight if weight is None else Factor(weight, len(weight)))])
    return config.rule.shift(config, config.rule.range(config, number_format, measurement), 0)


@FORMATS
@pytest.mark.parametrize("method", MEASURING)
def test_no_sum_overflows(rng, number_format, method):
    for _ in range(20):
        gy, weight = layer(rng, number_format)
        scaled = (gy @ weight) * 2.0 ** shift_of(method, number_format, gy, weight)
        assert np.abs(scaled).max() <= number_format.max
        cast = gy * 2.0 ** shift_of(method, number_format, gy)
        assert np.abs(cast).max() <= number_format.max


@FORMATS
def test_auto_brings_the_amax_of_a_cast_to_a_fixed_distance_below_the_largest_number(rng, number_format):
    gy, _ = layer(rng, number_format)
    scaled = np.abs(gy).max() * 2.0 ** shift_of("auto", number_format, gy)
    assert number_format.max / 2**5 < scaled <= number_format.max / 2**4


@FORMATS
def test_abs_range_keeps_the_smallest_element_if_the_largest_allows_it(rng, number_format):
    smallest = number_format.smallest_subnormal
    narrow = smallest * 2.0 ** rng.uniform(-30, -28, 100)
    shift = shift_of("abs_range", number_format, narrow[None])
    assert smallest / 2 < np.abs(narrow).min() * 2.0**shift <= smallest
    wide = np.append(narrow, number_format.max)
    assert shift_of("abs_range", number_format, wide[None]) == 0


@FORMATS
def test_approx_range_lets_the_promised_share_fall_below_the_smallest_number(rng, number_format):
    gy = number_format.smallest_subnormal * 2.0**-10 * rng.standard_normal((1, 200_000))
    config = AdaLossConfig(
        loss_scale_method="approx_range",
        scale_upper_bound=None,
        accum_upper_bound=None,
        cast_distribution="normal",
    )
    (measurement,) = fetch([measure(config, gy)])
    shift = config.rule.shift(config, config.rule.range(config, number_format, measurement), 0)
    share = np.mean(np.abs(gy) * 2.0**shift < number_format.smallest_subnormal)
    assert config.n_uf < share < 2.5 * config.n_uf


@FORMATS
def test_weights_carry_no_shift_that_takes_them_out_of_the_format(number_format):
    weight = np.full((4, 4), 3.0)
    config = unbounded("auto")
    (measurement,) = fetch([measure(config, weight, Factor(weight, 4))])
    most = config.rule.range(config, number_format, measurement).max_weight_shift
    assert 3.0 * 2.0**most <= number_format.max / 2 < 3.0 * 2.0 ** (most + 1)


@FORMATS
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_chooses_for_its_format(rng, number_format, method):
    gy, _ = layer(rng, number_format)
    policy = ShiftPolicy(unbounded(method), number_format=number_format)
    decision = policy.choose(Site("/", 0), 0, lambda config: measure(config, gy))
    assert decision.shift == shift_of(method, number_format, gy)
    assert decision.rule == RULES[method]


def test_fixed_looks_at_nothing():
    assert measure(unbounded(FIXED.name), None) == Ready(fetch([measure(unbounded(FIXED.name), None)])[0])
