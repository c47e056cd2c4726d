"""Ranges of several gradients, and over time."""

from itertools import permutations

from ada_loss.core.range import NOTHING, UNUSABLE, Range

FOUND = Range(wanted=3, safe=9, max_weight_shift=4, zeros=0.25)
OTHER = Range(wanted=5, safe=7, max_weight_shift=6, zeros=0.5)


def test_the_smallest_decides_what_is_wanted_and_the_largest_what_is_safe():
    for first, second in permutations((FOUND, OTHER)):
        assert first.merged(second) == Range(wanted=5, safe=7, max_weight_shift=4, zeros=0.5)


def test_zeros_add_nothing_but_their_share():
    zeros = Range(nothing=True, zeros=1.0)
    for merged in (FOUND.merged(zeros), zeros.merged(FOUND)):
        assert merged == Range(wanted=3, safe=9, max_weight_shift=4, zeros=1.0)
    assert NOTHING.merged(zeros).nothing


def test_what_is_not_finite_spoils_the_whole():
    for other in (FOUND, NOTHING, UNUSABLE):
        assert UNUSABLE.merged(other) == other.merged(UNUSABLE) == UNUSABLE


def test_only_a_range_of_something_finite_decides():
    assert FOUND.decides and not NOTHING.decides and not UNUSABLE.decides


def test_a_step_without_gradients_is_remembered_only_as_zeros():
    assert Range(nothing=True, zeros=1.0).remembering(FOUND) == Range(3, 9, 4, 1.0)
    assert OTHER.remembering(FOUND) == OTHER
    assert NOTHING.remembering(None) == NOTHING
