"""States of policies, also those of version 1."""

import json

import pytest

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Decision, Site
from ada_loss.core.policy import ACCUMULATION, ShiftPolicy
from ada_loss.core.range import Range
from ada_loss.core.rules import APPROX_RANGE, FIXED

# Written by version 0.1.0, after two steps of a network with two layers.
VERSION_1 = """{"iteration": 2, "entry": {"initial": 0, "exponent": 0, "good_steps": 2, "overflows": 0,
"skipped": 0}, "decisions": [["(entry)", 0, 0, "approx_range", 0, 0, [-17, 14, 0.0, 14]],
["/b", 0, 0, "approx_range", 3, 1, [-14, 12, 0.25, 14]],
["/c", 0, 0, "fixed", 0, 0, [-Infinity, Infinity, 0.0, Infinity]],
["/d", 0, 0, "approx_range", 0, 0, [-Infinity, 5, 0.0, 3]]],
"peaks": [["(meeting)", 1, 0, 3.091796875], ["(meeting)", 1, 1, 2.263671875]]}"""


def policy():
    return ShiftPolicy(AdaLossConfig(loss_scale_method="approx_range", timing="delayed"))


def test_a_state_of_version_1_goes_on():
    loaded = policy()
    loaded.load_json(VERSION_1)
    assert loaded.iteration == 2 and loaded.entry.good_steps == 2
    assert loaded.decisions[Site("/b", 0)] == Decision(
        Site("/b", 0), APPROX_RANGE, 3, 1, Range(wanted=-14, safe=12, max_weight_shift=14, zeros=0.25)
    )
    fixed, unwanted = loaded.decisions[Site("/c", 0)], loaded.decisions[Site("/d", 0)]
    assert fixed.rule == FIXED and fixed.range.nothing
    assert unwanted.rule.shift(loaded.config, unwanted.range, 0) == 0
    assert loaded._amaxes == {Site(ACCUMULATION, 1, 0): 3.091796875, Site(ACCUMULATION, 1, 1): 2.263671875}


def test_a_state_comes_back_as_it_was():
    first, second = policy(), policy()
    first.load_json(VERSION_1)
    second.load_json(first.to_json())
    assert second.to_json() == first.to_json()
    assert "Infinity" not in first.to_json()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state | {"version": 99},
        lambda state: {"iteration": 3},
        lambda state: state | {"decisions": [["/b", 0, 0, "no_rule", 0, 0, [0] * 6]]},
        lambda state: state | {"decisions": [["/b", 0]]},
        lambda state: [],
    ],
)
def test_any_other_is_refused_and_nothing_is_changed(spoil):
    loaded = policy()
    loaded.load_json(VERSION_1)
    before = loaded.to_json()
    with pytest.raises(ValueError, match="another version of ada_loss"):
        loaded.load_json(json.dumps(spoil(json.loads(before))))
    assert loaded.to_json() == before
