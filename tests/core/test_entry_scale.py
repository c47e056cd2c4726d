"""The entry scale: Chainer's dynamic rule in powers of two, and the answer of every method to overflow."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.entry_scale import PATIENCE, RECOVERY_INTERVAL, EntryScale
from ada_loss.core.formats import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16

MIN_EXPONENT, MAX_EXPONENT = -24, 15


def run(entry, outcomes):
    for finite in outcomes:
        entry = entry.after(finite=finite)
    return entry


outcomes = st.lists(st.booleans(), max_size=60)
configs = st.builds(
    AdaLossConfig,
    init_scale=st.sampled_from([2.0**-4, 1.0, 2.0**10]),
    dynamic_interval=st.sampled_from([None, 1, 3]),
)


def test_a_fixed_scale_stays_while_nothing_overflows():
    entry = EntryScale.from_config(AdaLossConfig(init_scale=128))
    assert run(entry, [True] * 5000).exponent == entry.exponent == 7


def test_an_overflow_halves_the_scale_and_counts():
    entry = EntryScale.from_config(AdaLossConfig(init_scale=128)).after(finite=False)
    assert (entry.exponent, entry.scale, entry.skipped, entry.backoff) == (6, 64.0, 1, 1)


def test_a_fixed_scale_recovers_one_step_after_a_long_good_stretch_and_no_further_than_its_initial_value():
    entry = run(EntryScale.from_config(AdaLossConfig(init_scale=128)), [False, False])
    assert run(entry, [True] * (RECOVERY_INTERVAL - 1)).exponent == 5
    assert run(entry, [True] * RECOVERY_INTERVAL).exponent == 6
    assert run(entry, [True] * (5 * RECOVERY_INTERVAL)).exponent == 7


def test_a_dynamic_scale_doubles_at_every_good_step_until_the_first_overflow():
    entry = EntryScale.from_config(AdaLossConfig(dynamic_interval=100))
    assert [run(entry, [True] * n).exponent for n in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("interval", [1, 4])
def test_after_an_overflow_a_dynamic_scale_doubles_every_interval_good_steps(interval):
    entry = run(EntryScale.from_config(AdaLossConfig(dynamic_interval=interval)), [True] * 8 + [False])
    assert entry.exponent == 7
    assert run(entry, [True] * (interval - 1)).exponent == 7
    assert run(entry, [True] * interval).exponent == 8
    assert run(entry, [True] * (3 * interval)).exponent == 10


def test_an_overflow_starts_the_interval_anew():
    entry = run(EntryScale.from_config(AdaLossConfig(dynamic_interval=3)), [True] * 5 + [False])
    assert run(entry, [True, True, False, True, True]).exponent == entry.exponent - 1


def test_a_dynamic_scale_stops_growing_at_the_largest_power_of_two_of_float16():
    entry = EntryScale.from_config(AdaLossConfig(dynamic_interval=1))
    assert run(entry, [True] * 100).exponent == MAX_EXPONENT == 15


def test_training_has_diverged_when_steps_keep_overflowing_at_the_smallest_scale():
    entry = run(EntryScale.from_config(AdaLossConfig()), [False] * -MIN_EXPONENT)
    assert entry.exponent == MIN_EXPONENT
    assert not run(entry, [False] * (PATIENCE - 1)).diverged
    assert run(entry, [False] * PATIENCE).diverged


@pytest.mark.parametrize("interval", [None, 3])
def test_a_step_that_no_scale_helps_leaves_the_scale_and_the_good_steps_and_counts_as_skipped(interval):
    entry = run(EntryScale.from_config(AdaLossConfig(dynamic_interval=interval)), [False, True, True])
    bad = entry.after(finite=False, scale_helps=False)
    assert (bad.exponent, bad.good_steps, bad.skipped) == (entry.exponent, 2, 2)


@given(st.lists(st.booleans(), max_size=60))
def test_training_diverges_after_as_many_steps_in_a_row_whether_a_scale_would_help_or_not(helps):
    entry, lowered = EntryScale.from_config(AdaLossConfig()), EntryScale.from_config(AdaLossConfig())
    for scale_helps in helps:
        entry = entry.after(finite=False, scale_helps=scale_helps)
        lowered = lowered.after(finite=False)
        assert entry.diverged == lowered.diverged


def test_one_good_step_at_the_smallest_scale_restores_patience():
    entry = run(EntryScale.from_config(AdaLossConfig()), [False] * (PATIENCE - 1 - MIN_EXPONENT))
    assert not run(entry, [True] + [False] * (PATIENCE - 1)).diverged


def test_a_scale_that_starts_below_the_smallest_is_not_raised_by_an_overflow():
    entry = EntryScale.from_config(AdaLossConfig(init_scale=2.0**-40))
    assert entry.after(finite=False).exponent == -40


@given(configs, outcomes)
def test_the_scale_stays_within_its_bounds(config, steps):
    entry = run(EntryScale.from_config(config), steps)
    assert MIN_EXPONENT <= entry.exponent <= max(MAX_EXPONENT, config.init_exponent)
    assert entry.skipped == steps.count(False)
    assert entry.backoff >= 0


@given(configs, outcomes, outcomes)
def test_a_restored_scale_continues_like_the_uninterrupted_one(config, before, after):
    entry = run(EntryScale.from_config(config), before)
    state = json.loads(json.dumps(entry.to_state()))
    restored = EntryScale.from_config(config).restored(state)
    assert restored == entry
    assert run(restored, after) == run(entry, after)


def test_a_restored_scale_follows_the_settings_of_now():
    state = run(EntryScale.from_config(AdaLossConfig(dynamic_interval=100)), [True, False]).to_state()
    entry = EntryScale.from_config(AdaLossConfig(dynamic_interval=2)).restored(state)
    assert run(entry, [True, True]).exponent == entry.exponent + 1


def test_a_resumed_scale_that_is_to_start_elsewhere_does_so_without_a_back_off():
    saved = run(EntryScale.from_config(AdaLossConfig()), [False, False, True]).to_state()
    resumed = EntryScale.from_config(AdaLossConfig(init_scale=1024.0)).restored(saved)
    assert (resumed.exponent, resumed.backoff, resumed.skipped) == (10, 0, 2)


@pytest.mark.parametrize(
    "settings, outcomes, expected",
    [
        ({}, [], "EntryScale(2**0 = 1, 0 steps skipped, as set)"),
        ({"init_scale": 128}, [True, False], "EntryScale(2**6 = 64, 1 step skipped, backed off from 2**7)"),
        ({"dynamic_interval": 2}, [True] * 3, "EntryScale(2**3 = 8, 0 steps skipped, dynamic)"),
        ({}, [False] * 32, "EntryScale(2**-24 = 5.96046e-08, 32 steps skipped, diverged)"),
    ],
)
def test_it_is_printed_as_its_scale_its_skipped_steps_and_its_state(settings, outcomes, expected):
    assert repr(run(EntryScale.from_config(AdaLossConfig(**settings)), outcomes)) == expected


@pytest.mark.parametrize("number_format", [FLOAT16, BFLOAT16, FLOAT8_E5M2, FLOAT8_E4M3])
def test_the_scale_stays_within_the_format(number_format):
    config = AdaLossConfig(dynamic_interval=1)
    grown = run(EntryScale.from_config(config, number_format), [True] * 300)
    assert grown.scale <= number_format.max < 2 * grown.scale
    lowered = run(EntryScale.from_config(config, number_format), [False] * 300)
    assert lowered.scale == number_format.smallest_subnormal
    assert lowered.diverged
