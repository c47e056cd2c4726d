"""Verdicts: for each place one word with its number, for the model one sentence.

The words mean, over all sampled steps of a run:

- *never trained*: the gradient was zero everywhere, in float32 too;
- *overflow on the forward pass*: a result was not finite; no scale of gradients can help;
- *overflow in backward*: a step was skipped, and this was the first place that was not finite;
- *underflow*: more than 0.1 % of the elements that float32 has non-zero were zero in this run (measured,
  where the run holds a float32 reference, element by element), or would be below float16's smallest number;
- *fine*: none of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ada_loss.core.formats import FLOAT16, FloatFormat
from ada_loss.core.histogram import Histogram, merge
from ada_loss.core.records import ACTIVATION, Place, PlaceRecord, StepRecord
from ada_loss.core.windows import MOST_UNDERFLOW, Window, find_window, intersect


class Word(str, Enum):
    """What can be said of a place."""

    FINE = "fine"
    UNDERFLOW = "underflow"
    OVERFLOW_BACKWARD = "overflow in backward"
    OVERFLOW_FORWARD = "overflow on the forward pass"
    NEVER_TRAINED = "never trained"


@dataclass(frozen=True)
class Verdict:
    """A word and its number: the share lost, or in how many steps it overflowed or was zero. needs: the
    exponent of the smallest scale at which hardly anything would be lost."""

    word: Word
    number: float = 0.0
    needs: float = -math.inf

    def __str__(self) -> str:
        if self.word is Word.UNDERFLOW:
            needs = f", needs 2^{self.needs:.0f}" if math.isfinite(self.needs) else ""
            return f"underflow, {percent(self.number)} lost{needs}"
        if self.word is Word.FINE:
            return "fine"
        steps = f"{self.number:.0f} step{'s' * (self.number != 1)}"
        if self.word is Word.NEVER_TRAINED:
            return f"never trained in {steps}"
        return f"{self.word.value}, {steps}"


@dataclass(frozen=True)
class PlaceSummary:
    """All that was recorded of one place, in one.

    truth: true values of all finite sampled steps, those of float32 where the run holds them. own: the same
    of the run. lost: the share of the elements that float32 has non-zero and this run had not; None if that
    was not measured. faint: the share of this run's own elements that is below the format's smallest number
    at the scales that they were carried with. lowest_exponent, highest_exponent: carried at least and at
    most. steps: how many were sampled. nonfinite: in how many of them something was not finite. broke: the
    first step in which that was so, or a result was too large for the format. began: how many overflows began
    here. window: the scales that suit.
    """

    place: Place
    truth: Histogram
    own: Histogram
    lost: float | None
    lowest_exponent: int
    highest_exponent: int
    steps: int
    faint: float
    nonfinite: int
    broke: int | None
    began: int
    window: Window
    number_format: FloatFormat = FLOAT16

    @property
    def verdict(self) -> Verdict:
        """What became of this place in the run."""
        if self.place.kind == ACTIVATION:
            # In float32 a result may be finite that float16 does not hold.
            overflows = self.nonfinite or int(self.broke is not None)
            return Verdict(Word.OVERFLOW_FORWARD, overflows) if overflows else Verdict(Word.FINE)
        if self.began:
            return Verdict(Word.OVERFLOW_BACKWARD, self.began)
        if not self.truth.nonzero and not self.nonfinite:
            return Verdict(Word.NEVER_TRAINED, self.steps)
        lost = self.lost
        return self._underflow(self.faint if lost is None else lost)

    def at(self, exponent: int) -> Verdict:
        """What would become of this place at the scale 2**exponent, the values in it being the true ones.

        What has already been lost on the way here would come on top.
        """
        if self.place.kind == ACTIVATION or not self.truth.nonzero:
            return self.verdict
        if self.truth.overflows(exponent, self.number_format) or exponent > self.window.highest:
            return Verdict(Word.OVERFLOW_BACKWARD, self.steps)
        return self._underflow(self.truth.underflow(exponent, self.number_format))

    def _underflow(self, lost: float) -> Verdict:
        if lost <= MOST_UNDERFLOW:
            return Verdict(Word.FINE, lost)
        return Verdict(Word.UNDERFLOW, lost, self.window.lowest)


def summarize(
    places: Iterable[PlaceRecord], steps: Iterable[StepRecord] = (), number_format: FloatFormat = FLOAT16
) -> list[PlaceSummary]:
    """The places of a run in the order in which they were first met, each with everything recorded of it."""
    by_place: dict[Place, list[PlaceRecord]] = {}
    for record in places:
        by_place.setdefault(record.place, []).append(record)
    began: dict[Place, list[int]] = {}
    for step in steps:
        if step.skipped and step.began is not None:
            began.setdefault(step.began, []).append(step.step)
    return [
        _summarize(place, records, began.get(place, []), number_format) for place, records in by_place.items()
    ]


def _summarize(
    place: Place, records: Sequence[PlaceRecord], began: Sequence[int], number_format: FloatFormat
) -> PlaceSummary:
    finite = [record for record in records if record.finite]
    own = merge([record.histogram for record in finite])
    truth = merge([record.reference or record.histogram for record in finite])
    measured = [record for record in finite if record.lost is not None and record.reference is not None]
    known = sum(record.reference.nonzero for record in measured if record.reference is not None)
    gone = sum(record.lost or 0 for record in measured)
    carried = merge([record.histogram.scaled(record.exponent) for record in finite])
    exponents = [record.exponent for record in records]
    # Where it overflowed first, that scale is too large, though nothing is known of the values.
    too_large = [record.exponent for record in records if record.step in began and not record.finite]
    window = find_window(truth, number_format).intersection(
        Window(highest=min(too_large, default=math.inf) - 1)
    )
    return PlaceSummary(
        place,
        truth,
        own,
        (gone / known if known else 0.0) if measured else None,
        min(exponents),
        max(exponents),
        len(records),
        carried.underflow(0, number_format),
        len(records) - len(finite),
        next((record.step for record in records if _breaks(record, number_format)), None),
        len(began),
        window,
        number_format,
    )


def _breaks(record: PlaceRecord, number_format: FloatFormat) -> bool:
    """Whether something is not finite, or, on the forward pass, would not be in the format."""
    forward = record.place.kind == ACTIVATION
    return not record.finite or forward and record.histogram.overflows(0, number_format)


def gradients(places: Iterable[PlaceSummary]) -> list[PlaceSummary]:
    """Without the forward pass, on which scales of gradients have no bearing."""
    return [summary for summary in places if summary.place.kind != ACTIVATION]


def common_window(places: Iterable[PlaceSummary]) -> Window:
    """The scales that suit every gradient."""
    return intersect(summary.window for summary in gradients(places))


def model_sentence(places: Sequence[PlaceSummary]) -> str:
    """What can be said of a model: which single scale suits, or why none does."""
    broken = [summary for summary in places if summary.place.kind == ACTIVATION and summary.broke is not None]
    if broken:
        first = min(broken, key=lambda summary: summary.broke or 0)
        where = f"{first.place.path} at step {first.broke}"
        return f"The forward pass overflows, first in {where}: no scale of gradients can help."
    backward = [summary for summary in gradients(places) if summary.truth.nonzero]
    if not backward:
        return "No gradient was recorded that is not zero: nothing can be said of scales."
    low = max(backward, key=lambda summary: summary.window.lowest)
    high = min(backward, key=lambda summary: summary.window.highest)
    lowest, highest = low.window.lowest, high.window.highest
    if lowest <= highest:
        scales = f"from {power(lowest)} to {power(highest)}" if lowest < highest else f"{power(lowest)} alone"
        some = f"Any scale {scales} works" if lowest < highest else f"Of all scales {scales} works"
        return (
            f"{some}: plain float16 does." if lowest <= 0 <= highest else f"{some}; plain float16 does not."
        )
    if low is high:
        return (
            f"No single scale fits: {low.place.path} alone needs at least {power(lowest)} and overflows "
            f"above {power(highest)}."
        )
    return (
        f"No single scale fits: {low.place.path} needs at least {power(lowest)}, {high.place.path} overflows "
        f"above {power(highest)}."
    )


def scale_sentence(places: Sequence[PlaceSummary], exponent: int, name: str) -> str:
    """What one scale for all would do, after its name: the worst that it does to any gradient."""
    judged = [(summary, summary.at(exponent)) for summary in gradients(places)]
    overflown = [summary for summary, verdict in judged if verdict.word is Word.OVERFLOW_BACKWARD]
    if overflown:
        first = min(overflown, key=lambda summary: summary.window.highest)
        return f"{name} overflows in {first.place.path}{_others(' and in', len(overflown) - 1)}"
    lossy = [(summary, verdict) for summary, verdict in judged if verdict.word is Word.UNDERFLOW]
    if not lossy:
        return f"{name} works everywhere"
    worst, verdict = max(lossy, key=lambda pair: pair[1].number)
    others = _others(" and some of", len(lossy) - 1)
    return f"{name} loses {percent(verdict.number)} of {worst.place.path}{others}"


def percent(share: float) -> str:
    """A share in percent, with as many digits as tell it from none and from all."""
    value = 100 * share
    if 0 < value < 0.1:
        return "under 0.1 %"
    if 99.5 <= value < 100:
        return f"{math.floor(value * 100) / 100:.2f} %" if value < 99.99 else "over 99.99 %"
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %"


def power(exponent: float) -> str:
    """A scale as a power of two."""
    return f"2^{exponent:.0f}" if math.isfinite(exponent) else "any"


def _others(link: str, count: int) -> str:
    return f"{link} {count} more place{'s' * (count != 1)}" if count else ""
