"""Rules on tensors choose what those of the core choose from numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.formats import FLOAT16
from ada_loss.core.measurement import Measurement, Statistics
from ada_loss.torch.shifts import factor_to, floor_power_of_two, shifts_for
from ada_loss.torch.statistics import finite_peak, peak


def measured(x):
    """Statistics as numbers, all of them."""
    values = x.double().abs()
    kept = values[values > 0]
    logs = kept.log()
    return Statistics(
        x.numel(),
        len(kept),
        float(values.square().sum()),
        float(values.max()),
        float(kept.min()) if len(kept) else 0.0,
        bool(torch.isfinite(x).all()),
        float(logs.sum()),
        float(logs.square().sum()),
    )


def shift_of(config, measurement, exponent, backoff):
    found = config.rule.range(config, FLOAT16, measurement, exponent)
    return config.rule.shift(config, found, exponent, backoff=backoff)


SETTINGS = [
    {},
    {"scale_upper_bound": None, "accum_upper_bound": None},
    {"n_uf": 0.1, "scale_upper_bound": 1000.0},
    {"cast_distribution": "normal", "accum_upper_bound": 64.0},
]
methods = pytest.mark.parametrize("method", ["approx_range", "abs_range"])


@methods
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("magnitude", [-20, -12, -3, 4])
@pytest.mark.parametrize("backoff", [0, 3])
def test_of_products(method, settings, magnitude, backoff):
    config = AdaLossConfig(loss_scale_method=method, **settings)
    shifts = shifts_for(config, torch.tensor(2.0**-backoff))
    gradient, weight = (torch.randn(16, 32) * 2.0**magnitude).half(), torch.randn(32, 8).half()
    for exponent in (0, 5):
        measurement = Measurement(measured(gradient), measured(weight), 32)
        factor = shifts.of_product(
            gradient.float() @ weight.float(),
            torch.tensor(2.0**exponent, dtype=torch.float64),
            gradient,
            weight,
            32,
        )
        assert math.log2(factor) == shift_of(config, measurement, exponent, backoff)


@methods
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("magnitude", [-40, -12, 4])
@pytest.mark.parametrize("backoff", [0, 3])
def test_of_casts(method, settings, magnitude, backoff):
    config = AdaLossConfig(loss_scale_method=method, init_scale=4.0, **settings)
    entry = 2 - backoff
    gradient = torch.randn(16, 32) * 2.0**magnitude
    # The range is that of the true gradient, which arrives with the entry scale.
    measurement = Measurement(measured(gradient))
    found = config.rule.range(config, FLOAT16, measurement, 0)
    expected = entry + config.rule.shift(config, found, entry, backoff=backoff)
    scale = shifts_for(config, torch.tensor(2.0**entry)).entering(gradient)
    assert math.log2(scale) == expected


@pytest.mark.parametrize("magnitude", [-60, -12, 0, 30])
@pytest.mark.parametrize("backoff", [0, 3])
def test_auto_at_casts(magnitude, backoff):
    config = AdaLossConfig()
    gradient = torch.randn(16, 32) * 2.0**magnitude
    expected = shift_of(config, Measurement(measured(gradient)), 0, backoff)
    scale = shifts_for(config, torch.tensor(2.0**-backoff)).entering(gradient)
    assert math.log2(scale) == expected


@pytest.mark.parametrize("magnitude", [-20, 0, 5])
def test_auto_scales_products_by_their_own_peak(magnitude):
    shifts = shifts_for(AdaLossConfig())
    product = torch.randn(16, 32) * 2.0**magnitude
    factor = shifts.of_product(product, torch.ones((), dtype=torch.float64), product, product, 8)
    assert FLOAT16.max / 512 < (product * factor).abs().max() <= FLOAT16.max / 256


@pytest.mark.parametrize("method", ["auto", "approx_range", "abs_range", "fixed"])
@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, 0.0]])
def test_what_is_zero_or_not_finite_spoils_nothing(method, values):
    shifts = shifts_for(AdaLossConfig(loss_scale_method=method))
    x, one = torch.tensor(values), torch.ones((), dtype=torch.float64)
    finite = torch.isfinite(x)
    for factor in (shifts.entering(x), shifts.of_product(x, one, x, x, 1), shifts.of_sum(x, one)):
        assert math.isfinite(factor) and factor > 0
        assert torch.equal((x * factor)[finite] / factor, x[finite])


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_powers_of_two_below_a_number(number):
    assert floor_power_of_two(torch.tensor(number)).item() == 2.0 ** (math.frexp(number)[1] - 1)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_factor_to_a_target_is_the_largest(magnitude):
    factor = factor_to(1.0, torch.tensor(magnitude)).item()
    assert magnitude * factor <= 1 < 2 * magnitude * factor * (1 + 2.0**-22)


def test_peaks():
    assert peak(torch.tensor([1.0, -3.0])) == 3 and peak(torch.empty(0)) == 0
    assert finite_peak(torch.tensor([1.0, -3.0, math.inf, math.nan])) == 3
