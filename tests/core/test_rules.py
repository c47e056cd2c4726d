"""The rules against float64 computations of what they promise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ada_loss.arrays.measuring import measure
from ada_loss.core.config import METHODS, AdaLossConfig
from ada_loss.core.deferred import fetch
from ada_loss.core.formats import FLOAT16
from ada_loss.core.measurement import Factor
from ada_loss.core.rules import RULES

U_MIN, U_MAX = 2.0**-24, 65504.0
UNBOUNDED = AdaLossConfig(scale_upper_bound=None, accum_upper_bound=None)
PAPER_RULES = ["approx_range", "abs_range", "element_wise_range"]


def unbounded(method, **settings):
    return replace(UNBOUNDED, loss_scale_method=method, **settings)


def measured(config, gy, weight, fan=1, **options):
    factor = None if weight is None else Factor(weight, fan, **options)
    return fetch([measure(config, gy, factor)])[0]


def shift_of(config, gy, weight, fan=1, exponent=0, **options):
    return shift_by(config, measured(config, gy, weight, fan, **options), exponent)


def shift_by(config, measurement, exponent=0, number_format=FLOAT16, **options):
    """The shift for the measured gradient itself, which carries `exponent`."""
    found = config.rule.range(config, number_format, measurement, exponent)
    return config.rule.shift(config, found, exponent, **options)


def gaussian_layer(rng, *, batch=4000, outputs=128, inputs=250, gy_scale=1e-4, weight_scale=1e-4, mask=True):
    """gy of a linear layer behind a ReLU, and its weights, both float16."""
    gy = rng.normal(size=(batch, outputs)) * gy_scale
    if mask:
        gy *= rng.random(gy.shape) < 0.5
    return gy.astype(np.float16), (rng.normal(size=(outputs, inputs)) * weight_scale).astype(np.float16)


def exact_input_gradient(gy, weight):
    return gy.astype(np.float64) @ weight.astype(np.float64)


def share_of_zeros(exact, shift):
    """The share of nonzero elements that float16 turns into zero when they are scaled by 2**shift."""
    exact = exact[exact != 0]
    return np.mean((exact * 2.0**shift).astype(np.float16) == 0)


def normal_quantile(p):
    """z with P(|N(0, 1)| < z) = p, by bisection."""
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < p else (low, middle)
    return low


def rounded_down(scale):
    return math.floor(math.log2(scale))


# What approx_range promises


@pytest.mark.parametrize("n_uf", [1e-2, 1e-3])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("gy_scale", "weight_scale"), [(1e-4, 1e-4), (7e-6, 3e-3), (3e-3, 1e-6)])
def test_approx_range_lets_at_most_the_promised_share_underflow_and_not_much_less(
    n_uf, mask, gy_scale, weight_scale
):
    rng = np.random.default_rng(0)
    gy, weight = gaussian_layer(rng, gy_scale=gy_scale, weight_scale=weight_scale, mask=mask)
    config = unbounded("approx_range", n_uf=n_uf)
    shift = shift_of(config, gy, weight, fan=128)
    share = share_of_zeros(exact_input_gradient(gy, weight), shift)
    assert shift > 0
    assert n_uf / 5 < share <= n_uf


def test_approx_range_follows_its_formula():
    rng = np.random.default_rng(1)
    for _ in range(20):
        gy, weight = gaussian_layer(rng, batch=50, gy_scale=10 ** rng.uniform(-6, -3), weight_scale=1e-3)
        n_uf = float(rng.uniform(1e-4, 0.4))
        second_moments = [np.mean(np.square(x.astype(np.float64))) for x in (gy, weight)]
        sigma = math.sqrt(second_moments[0] * second_moments[1] * 128 / 2)
        expected = rounded_down(max(1, U_MIN / (normal_quantile(n_uf) * sigma)))
        assert shift_of(unbounded("approx_range", n_uf=n_uf), gy, weight, fan=128) == expected


@pytest.mark.parametrize("n_uf", [1e-2, 1e-3])
@pytest.mark.parametrize("gy_scale", [1e-5, 1e-4, 1e-3])
def test_approx_range_covers_a_convolution_by_its_fan(n_uf, gy_scale):
    rng = np.random.default_rng(2)
    gy = (rng.normal(size=(2, 16, 40, 40)) * gy_scale).astype(np.float16)
    weight = (rng.normal(size=(16, 8, 3, 3)) * 1e-4).astype(np.float16)
    windows = np.lib.stride_tricks.sliding_window_view(gy.astype(np.float64), (3, 3), axis=(2, 3))
    exact = np.tensordot(windows, weight[:, :, ::-1, ::-1].astype(np.float64), ((1, 4, 5), (0, 2, 3)))
    shift = shift_of(unbounded("approx_range", n_uf=n_uf), gy, weight, fan=16 * 9)
    assert n_uf / 5 < share_of_zeros(exact, shift) <= n_uf


def test_a_wanted_share_needs_less_scale_the_larger_it_is():
    gy, weight = gaussian_layer(np.random.default_rng(3), batch=50)
    shifts = [
        shift_of(unbounded("approx_range", n_uf=n), gy, weight, fan=128) for n in (1e-4, 1e-3, 1e-2, 0.1)
    ]
    assert shifts == sorted(shifts, reverse=True) and shifts[0] > shifts[-1]


# Casts


def skewed_gradient(rng, size=400_000, deviation=3.0):
    signs = rng.choice([-1.0, 1.0], size=size)
    gy = (signs * np.exp(rng.normal(-20.0, deviation, size=size))).astype(np.float32)
    gy[rng.random(size) < 0.3] = 0
    return gy


def test_log_normal_tails_keep_the_promised_share_of_a_skewed_gradient():
    gy = skewed_gradient(np.random.default_rng(4))
    share = share_of_zeros(gy, shift_of(unbounded("approx_range"), gy, None))
    assert 1e-3 / 5 < share < 1.1e-3


def test_normal_tails_lose_many_times_more_of_a_skewed_gradient():
    gy = skewed_gradient(np.random.default_rng(4))
    config = unbounded("approx_range", cast_distribution="normal")
    assert share_of_zeros(gy, shift_of(config, gy, None)) > 10e-3


def test_normal_tails_keep_the_promised_share_of_a_normal_gradient():
    gy = np.random.default_rng(5).normal(size=1_000_000).astype(np.float32) * np.float32(1e-8)
    config = unbounded("approx_range", cast_distribution="normal")
    assert 1e-3 / 5 < share_of_zeros(gy, shift_of(config, gy, None)) < 1.1e-3


def test_log_normal_follows_its_formula():
    gy = skewed_gradient(np.random.default_rng(6), size=5000)
    logarithms = np.log(np.abs(gy[gy != 0].astype(np.float64)))
    # P(N(0, 1) < -z) = n_uf is P(|N(0, 1)| < z) = 1 - 2 n_uf.
    low_quantile = logarithms.mean() - logarithms.std() * normal_quantile(1 - 2 * 1e-3)
    expected = rounded_down(max(1, U_MIN / math.exp(low_quantile)))
    assert shift_of(unbounded("approx_range"), gy, None) == expected


def test_the_gradient_of_a_softmax_survives_its_cast():
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(4000, 20)) * 4
    gy = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gy[np.arange(4000), rng.integers(20, size=4000)] -= 1
    gy = (gy / 4000).astype(np.float32)
    assert share_of_zeros(gy, 0) > 0.2
    assert share_of_zeros(gy, shift_of(unbounded("approx_range"), gy, None)) < 2e-3


# Extremes


def test_abs_range_keeps_the_smallest_possible_product():
    rng = np.random.default_rng(8)
    for _ in range(20):
        gy, weight = gaussian_layer(rng, batch=30, outputs=20, inputs=10, gy_scale=1e-4, weight_scale=0.1)
        gys, weights = (np.abs(x[x != 0].astype(np.float64)) for x in (gy, weight))
        smallest, largest = gys.min() * weights.min(), gys.max() * weights.max()
        expected = rounded_down(min(U_MIN / smallest, U_MAX / (20 * largest)))
        assert shift_of(unbounded("abs_range"), gy, weight, fan=20) == expected


def all_products(gy, weight, pattern):
    products = np.abs(np.einsum(pattern, gy.astype(np.float64), weight.astype(np.float64)))
    return products[products > 0]


@pytest.mark.parametrize(
    ("gy_shape", "weight_shape", "pattern", "channel_axis"),
    [
        ((7, 6), (6, 5), "no,oi->noi", 0),
        ((2, 6, 4, 4), (6, 5, 3, 3), "nohw,oiyx->nohwiyx", 0),
        ((2, 6, 4, 4), (5, 6, 3, 3), "nohw,ioyx->nohwiyx", 1),
        ((2, 2, 3, 4, 4), (2, 5, 3, 2, 2), "ngohw,gioyx->ngohwiyx", 1),
    ],
    ids=["linear", "convolution", "deconvolution", "grouped deconvolution"],
)
def test_element_wise_range_knows_the_extremes_of_the_products(gy_shape, weight_shape, pattern, channel_axis):
    rng = np.random.default_rng(9)
    for _ in range(10):
        gy = (rng.normal(size=gy_shape) * 10.0 ** rng.uniform(-3, -1, size=gy_shape)).astype(np.float16)
        gy[rng.random(gy_shape) < 0.4] = 0
        weight = (rng.normal(size=weight_shape) * 10.0 ** rng.uniform(-4, -3, size=weight_shape)).astype("f2")
        weight[rng.random(weight_shape) < 0.2] = 0
        products = all_products(gy, weight, pattern)
        if gy.ndim == 5:  # groups are an axis of their own only in the reference
            gy, weight = gy.reshape(2, 6, 4, 4), weight.reshape(10, 3, 2, 2)
        measurement = measured(unbounded("element_wise_range"), gy, weight, 54, channel_axis=channel_axis)
        assert measurement.smallest_term == products.min()
        assert measurement.largest_term == products.max()
        expected = rounded_down(min(max(1, U_MIN / products.min()), U_MAX / (54 * products.max())))
        assert shift_by(unbounded("element_wise_range"), measurement) == expected


def test_element_wise_range_leaves_out_weights_that_meet_only_zeros():
    gy = np.array([[0, 1e-3]], np.float16)
    weight = np.array([[1e-6, 1e3], [1e-2, 1.0]], np.float16)
    smallest, largest = np.float64(gy[0, 1]) * np.float64(weight[1, 0]), np.float64(gy[0, 1])
    measurement = measured(unbounded("element_wise_range"), gy, weight, 2)
    assert (measurement.smallest_term, measurement.largest_term) == (smallest, largest)
    nothing_meets = np.array([[0, 0], [1, 1]], np.float16)
    assert (
        shift_of(unbounded("element_wise_range"), np.array([[1, 0]], np.float16), nothing_meets, fan=2) == 0
    )


# Overflow


@pytest.mark.parametrize("method", [*PAPER_RULES, "auto"])
def test_no_sum_overflows_even_where_all_terms_are_largest_and_agree(method):
    rng = np.random.default_rng(10)
    for _ in range(20):
        gy = np.full((4, 64), 10 ** rng.uniform(-3, 4)).astype(np.float16)
        weight = np.full((64, 8), 10 ** rng.uniform(-3, 2)).astype(np.float16)
        gy[0, 0] = weight[0, 0] = 2.0**-24  # what the smallest products ask for must not win
        scaled = exact_input_gradient(gy, weight) * 2.0 ** shift_of(unbounded(method), gy, weight, fan=64)
        assert np.isfinite(scaled.astype(np.float16)).all()


@pytest.mark.parametrize("method", [*PAPER_RULES, "auto"])
def test_a_cast_does_not_overflow(method):
    gy = np.array([2.0**-40, 1e-20, 3e7], np.float32)
    shift = shift_of(unbounded(method), gy, None)
    assert np.isfinite((gy * 2.0**shift).astype(np.float16)).all()


# Bounds and rounding


@pytest.mark.parametrize("method", PAPER_RULES)
@pytest.mark.parametrize(("bound", "expected"), [(16.0, 4), (1.0, 0), (24.0, 4), (None, 19)])
def test_a_layers_scale_keeps_its_bound(method, bound, expected):
    gy, weight = np.full((2, 1), 2.0**-23, np.float16), np.full((1, 2), 2.0**-20, np.float16)
    config = AdaLossConfig(loss_scale_method=method, scale_upper_bound=bound, accum_upper_bound=None)
    shift = shift_of(config, gy, weight, fan=1)
    assert shift == expected or (method == "approx_range" and bound is None and shift > expected)


@pytest.mark.parametrize("method", PAPER_RULES)
@pytest.mark.parametrize(("exponent", "expected"), [(0, 4), (5, 4), (6, 4), (8, 2), (10, 0), (13, -3)])
def test_the_scales_along_the_way_keep_theirs(method, exponent, expected):
    gy, weight = np.full((2, 1), 2.0**-23, np.float16), np.full((1, 2), 2.0**-20, np.float16)
    assert shift_of(AdaLossConfig(loss_scale_method=method), gy, weight, fan=1, exponent=exponent) == expected


def test_scales_are_rounded_down_to_a_power_of_two():
    config = unbounded("abs_range")
    for wanted, shift in ((8.0, 3), (8.1, 3), (15.99, 3), (16.0, 4), (0.7, 0)):
        gy = np.array([[U_MIN / wanted]], np.float32)
        assert shift_of(config, gy, np.ones((1, 1), np.float32), fan=1) == shift


@pytest.mark.parametrize("method", METHODS)
def test_a_lowered_gradient_is_not_scaled_back_up(method):
    gy, weight = gaussian_layer(np.random.default_rng(15), batch=50)
    found = [measured(unbounded(method), gy * np.float32(2.0**-b), weight, 128) for b in (0, 3)]
    shifts = [shift_by(unbounded(method), m, backoff=b) for m, b in zip(found, (0, 3), strict=True)]
    assert shifts[0] == shifts[1]


# Nothing to choose from


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_non_finite_values_give_no_shift(method):
    config = AdaLossConfig(loss_scale_method=method)
    ones = np.full((3, 4), 1e-5, np.float16)
    weight = np.full((4, 2), 1e-2, np.float16)
    for bad in (np.inf, np.nan):
        broken = ones.copy()
        broken[1, 2] = bad
        assert shift_of(config, broken, weight, fan=4) == 0
        assert shift_of(config, broken, None) == 0
        found = config.rule.range(config, FLOAT16, measured(config, broken, weight, 4))
        assert found.unusable == RULES[method].measures
    for nothing in (np.zeros_like(ones), ones[:0]):
        assert shift_of(config, nothing, weight, fan=4) == 0
        assert shift_of(config, nothing, None) == 0
    assert shift_of(config, ones, np.zeros_like(weight), fan=4) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitudes", [(1e-200, 1e-150), (5e-324, 1e-150), (1e200, 1e150)])
def test_products_that_not_even_float64_holds_give_no_shift(method, magnitudes):
    gy, weight = np.full((3, 4), magnitudes[0]), np.full((4, 2), magnitudes[1])
    for config in (AdaLossConfig(loss_scale_method=method), unbounded(method)):
        assert shift_of(config, gy, weight, fan=4) == 0


def test_fixed_never_shifts():
    config = unbounded("fixed", init_scale=2.0**12)
    gy, weight = gaussian_layer(np.random.default_rng(11), batch=20)
    assert shift_of(config, gy, weight, fan=128) == shift_of(config, gy, None) == 0


@pytest.mark.parametrize("method", METHODS)
def test_shifts_are_plain_integers(method):
    gy, weight = gaussian_layer(np.random.default_rng(12), batch=20)
    assert type(shift_of(AdaLossConfig(loss_scale_method=method), gy, weight, fan=128)) is int


# auto


@pytest.mark.parametrize("magnitude", range(-20, 12, 4))
def test_auto_brings_any_magnitude_to_the_same_place(magnitude):
    rng = np.random.default_rng(13)
    gy = rng.normal(size=(100, 32)).astype(np.float32)
    weight = rng.normal(size=(32, 16)).astype(np.float16)
    at_one = shift_of(unbounded("auto"), gy, weight, fan=32)
    assert shift_of(unbounded("auto"), gy * np.float32(2.0**magnitude), weight, fan=32) == at_one - magnitude


def test_auto_shrinks_what_is_too_large():
    rng = np.random.default_rng(14)
    gy = (rng.normal(size=(100, 32)) * 1000).astype(np.float16)
    weight = (rng.normal(size=(32, 16)) * 10).astype(np.float16)
    shift = shift_of(AdaLossConfig(loss_scale_method="auto"), gy, weight, fan=32)
    assert shift < 0
    assert np.abs(exact_input_gradient(gy, weight)).max() * 2.0**shift < U_MAX


def test_auto_does_not_look_at_the_papers_bounds():
    gy = np.full((2, 2), 1e-7, np.float16)
    config = AdaLossConfig(loss_scale_method="auto")
    assert shift_of(config, gy, None, exponent=40) == shift_of(unbounded("auto"), gy, None) > 20
