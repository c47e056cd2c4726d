"""Verdicts say of a run what its arrays say, measured against float32."""

import numpy as np
import pytest

from ada_loss.core.histogram import Histogram
from ada_loss.core.records import (
    ACTIVATION,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Place,
    PlaceRecord,
    StepRecord,
)
from ada_loss.core.verdicts import (
    Word,
    common_window,
    model_sentence,
    percent,
    scale_sentence,
    summarize,
)
from ada_loss.core.windows import Window


def record(values, path="/a", kind=INPUT_GRADIENT, step=0, exponent=0, reference=None):
    """A place that holds the true `values`; with `reference` beside those of float32."""
    lost = None if reference is None else int(np.sum((values == 0) & (reference != 0)))
    counted = None if reference is None else Histogram.of(reference)
    return PlaceRecord(step, Place(path, kind), Histogram.of(values), exponent, lost=lost, reference=counted)


def spread(rng, center, size=4000, deviation=1.0):
    return np.exp2(np.clip(rng.normal(center, deviation, size), center - 4, center + 4)).astype(np.float32)


def verdict(*records, steps=()):
    (summary,) = summarize(records, steps)
    return summary.verdict


def test_what_float16_zeroes_is_underflow_and_zeros_that_float32_has_are_not(rng):
    true = spread(rng, -25)
    true[rng.random(true.size) < 0.5] = 0
    kept = true.astype(np.float16)
    found = verdict(record(kept, reference=true))
    assert found.word is Word.UNDERFLOW
    assert found.number == np.mean(kept[true != 0] == 0)
    shift = int(found.needs)
    assert np.mean(np.abs(np.ldexp(true, shift)[true != 0]) < 2.0**-24) <= 1e-3
    assert f"needs 2^{shift}" in str(found)


def test_half_of_dead_relu_is_fine(rng):
    true = spread(rng, -8)
    true[::2] = 0
    assert verdict(record(true.astype(np.float16), reference=true)).word is Word.FINE


def test_losses_of_several_steps_are_taken_together(rng):
    lossless, lossy = spread(rng, 0), spread(rng, -60)
    zero = np.zeros_like(lossy)
    found = verdict(record(lossless, reference=lossless), record(zero, step=1, reference=lossy))
    assert found.number == 0.5


def test_a_gradient_that_is_zero_in_every_step_never_trained():
    zero = np.zeros(9, np.float16)
    found = verdict(record(zero), record(zero, step=5))
    assert (found.word, found.number) == (Word.NEVER_TRAINED, 2)


def test_a_gradient_that_only_float16_zeroes_underflows_though_no_element_is_left(rng):
    found = verdict(record(np.zeros(4000, np.float16), reference=spread(rng, -50)))
    assert (found.word, found.number) == (Word.UNDERFLOW, 1)


def test_overflow_counts_where_it_began(rng):
    steps = [StepRecord(0, skipped=True, began=Place("/a", INPUT_GRADIENT))]
    bad = np.array([1, np.inf])
    records = [record(bad, exponent=9), record(bad, "/b", exponent=9), record(spread(rng, 0), step=1)]
    records.append(record(spread(rng, 0), "/b", step=1))
    first, second = summarize(records, steps)
    assert first.verdict.word is Word.OVERFLOW_BACKWARD and str(first.verdict).endswith("1 step")
    assert second.verdict.word is Word.FINE
    assert first.window.highest == 8, "the scale at which it overflowed is too large"


def test_an_activation_that_is_not_finite_is_beyond_the_help_of_scales(rng):
    places = summarize([record(np.array([np.inf, 1]), "/body", ACTIVATION), record(spread(rng, 0), "/body")])
    assert places[0].verdict.word is Word.OVERFLOW_FORWARD
    says = "The forward pass overflows, first in /body at step 0: no scale of gradients can help."
    assert model_sentence(places) == says


def test_a_verdict_at_a_scale_is_what_float16_makes_of_the_elements(rng):
    true = spread(rng, -12, deviation=3.0)
    (summary,) = summarize([record(true)])
    for exponent in range(-30, 40, 3):
        scaled = np.ldexp(true.astype(np.float64), exponent)
        found = summary.at(exponent)
        if np.any(scaled > 65504):
            assert found.word is Word.OVERFLOW_BACKWARD
        elif np.mean(scaled < 2.0**-24) > 1e-3:
            assert (found.word, found.number) == (Word.UNDERFLOW, np.mean(scaled < 2.0**-24))
        else:
            assert found.word is Word.FINE


def values_between(lowest, highest):
    """Values for which exactly the scales from 2^lowest to 2^highest suit."""
    return np.array([2.0 ** (-24 - lowest), 65504 * 2.0**-highest])


class TestModel:
    def places(self, **windows):
        return summarize([record(values_between(*window), f"/{path}") for path, window in windows.items()])

    def test_a_window_common_to_all(self):
        places = self.places(body=(-4, 11), head=(3, 18))
        assert common_window(places) == Window(3, 11)
        assert model_sentence(places) == "Any scale from 2^3 to 2^11 works; plain float16 does not."

    def test_one_that_holds_plain_float16(self):
        assert (
            model_sentence(self.places(a=(-4, 11)))
            == "Any scale from 2^-4 to 2^11 works: plain float16 does."
        )

    def test_a_single_scale(self):
        assert model_sentence(self.places(a=(3, 5), b=(5, 9))).startswith("Of all scales 2^5 alone works")

    def test_none_at_all(self):
        assert (
            model_sentence(self.places(body=(-20, 9), head=(14, 30)))
            == "No single scale fits: /head needs at least 2^14, /body overflows above 2^9."
        )

    def test_a_place_that_no_scale_fits_by_itself(self):
        sentence = model_sentence(self.places(a=(12, 3)))
        assert sentence == "No single scale fits: /a alone needs at least 2^12 and overflows above 2^3."

    def test_nothing_recorded(self):
        assert "nothing can be said" in model_sentence([])

    @pytest.mark.parametrize(
        "exponent, says",
        [(7, "fixed 128 works everywhere"), (12, "overflows in /conv1/W"), (-3, "loses 50 % of /conv1/W")],
    )
    def test_what_one_scale_does(self, exponent, says):
        places = summarize([record(values_between(0, 9), "/conv1/W", WEIGHT_GRADIENT)])
        assert says in scale_sentence(places, exponent, "fixed 128")


@pytest.mark.parametrize(
    "share, text",
    [
        (0, "0 %"),
        (1e-5, "under 0.1 %"),
        (0.0123, "1.2 %"),
        (0.38, "38 %"),
        (0.99731, "99.73 %"),
        (0.999999, "over 99.99 %"),
        (1, "100 %"),
    ],
)
def test_a_share_is_never_rounded_to_none_or_to_all(share, text):
    assert percent(share) == text
