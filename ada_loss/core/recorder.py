"""Recorders: what an engine tells while a run goes on, on sampled steps; `OFF` is the one that listens to
nobody.

An engine asks `recorder.sampling` before it measures anything, hands each place to `observe`, and says at the
end of every step, sampled or not, what became of it:

    if recorder.sampling:
        recorder.observe(Place("/conv1", INPUT_GRADIENT), Histogram.of(gx, exponent), exponent=exponent)
    recorder.end_step(loss=loss, exponent=entry, skipped=False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ada_loss.core.histogram import Histogram
from ada_loss.core.record_file import RecordFile, RecordsInMemory
from ada_loss.core.records import ACTIVATION, UNSHIFTED, EndRecord, Place, PlaceRecord, Shift, StepRecord

Counted = Histogram | Callable[[], Histogram]
"""A histogram, or what waits for one: a GPU need not be waited for before the step ends."""


class Recorder(Protocol):
    """What an engine talks to."""

    @property
    def sampling(self) -> bool:
        """Whether the places of the present step are wanted."""

    def observe(
        self,
        place: Place,
        histogram: Counted,
        *,
        exponent: int = 0,
        shift: Shift = UNSHIFTED,
        lost: Callable[[], int] | int | None = None,
        reference: Counted | None = None,
    ) -> None:
        """Take note of a place, in the order in which the engine comes by; see `PlaceRecord`.

        A place that comes up several times in one step is taken for one, unless its path tells them apart.
        """

    def end_step(
        self,
        *,
        loss: float | None = None,
        exponent: int = 0,
        skipped: bool = False,
        began: Place | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Close a step; see `StepRecord`. Where a step was sampled, it knows by itself where it `began`."""

    def end(self, outcome: str = "finished") -> None:
        """Close the run; a second call does nothing."""


class NoRecorder:
    """Is told everything, and does nothing: what an engine talks to while nobody records."""

    sampling = False

    def observe(self, place: Place, histogram: Counted, **details: object) -> None:
        """Do nothing."""

    def end_step(self, **outcome: object) -> None:
        """Do nothing."""

    def end(self, outcome: str = "finished") -> None:
        """Do nothing."""


OFF: Recorder = NoRecorder()
"""No recording."""


@dataclass(frozen=True)
class _Observed:
    histogram: Counted
    exponent: int
    shift: Shift
    lost: Callable[[], int] | int | None
    reference: Counted | None


class RunRecorder:
    """Records a run into a file: every `every`-th step its places, and besides every step that was skipped.

    Holds the observations of one step at most. `lost` is the largest share that any gradient had lost in the
    latest sampled step: measured, or below the smallest float16; None before the first.

    Args:
        file: where to; `RecordsInMemory` will do as well.
        every: from how many steps one is sampled, beginning with the first.
        step: the number of the first step, in a run that goes on.

    Raises:
        ValueError: where `every` is not a positive integer.
    """

    def __init__(self, file: RecordFile | RecordsInMemory, *, every: int = 100, step: int = 0) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, not {every!r}.")
        self.file = file
        self.every = every
        self.step = step
        self.skipped = 0
        self.lost: float | None = None
        self._observed: dict[Place, list[_Observed]] = {}
        self._ended = False

    @property
    def sampling(self) -> bool:
        """Whether the places of the present step are wanted."""
        return not self._ended and self.step % self.every == 0 and self.file.wants(self.step // self.every)

    def observe(
        self,
        place: Place,
        histogram: Counted,
        *,
        exponent: int = 0,
        shift: Shift = UNSHIFTED,
        lost: Callable[[], int] | int | None = None,
        reference: Counted | None = None,
    ) -> None:
        """As `Recorder.observe`; between sampled steps nothing is kept."""
        if self.sampling:
            self._observed.setdefault(place, []).append(
                _Observed(histogram, exponent, shift, lost, reference)
            )

    def end_step(
        self,
        *,
        loss: float | None = None,
        exponent: int = 0,
        skipped: bool = False,
        began: Place | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """As `Recorder.end_step`: the records of the step are in the file when this returns."""
        self.skipped += skipped
        places = [self._record(place, several) for place, several in self._observed.items()]
        self._observed = {}
        if places:
            self.lost = max(map(_share_lost, places))
        if self.sampling or skipped or metrics:
            if skipped and began is None:
                began = next((record.place for record in places if not record.finite), None)
            step = StepRecord(self.step, loss, exponent, skipped, self.skipped, began, metrics or {})
            self.file.write([*places, step])
        self.step += 1

    def end(self, outcome: str = "finished") -> None:
        """As `Recorder.end`."""
        if not self._ended:
            self._ended = True
            self.file.write([EndRecord(self.step, outcome)])
            self.file.close()

    def _record(self, place: Place, several: list[_Observed]) -> PlaceRecord:
        """One record of all that was observed at a place in this step."""
        first, *more = several
        histogram = _counted(first.histogram)
        reference = None if first.reference is None else _counted(first.reference)
        lost = _number(first.lost)
        for other in more:
            histogram = histogram.merged(_counted(other.histogram))
            if reference is not None and other.reference is not None:
                reference = reference.merged(_counted(other.reference))
            if lost is not None:
                lost += _number(other.lost) or 0
        return PlaceRecord(self.step, place, histogram, first.exponent, first.shift, lost, reference)


def _share_lost(record: PlaceRecord) -> float:
    """The share that a gradient has lost; nothing of what the forward pass has computed."""
    if record.place.kind == ACTIVATION:
        return 0.0
    if record.lost is None or record.reference is None:
        return record.histogram.underflow(record.exponent)
    return record.lost / record.reference.nonzero if record.lost else 0.0


def _counted(histogram: Counted) -> Histogram:
    return histogram() if callable(histogram) else histogram


def _number(lost: Callable[[], int] | int | None) -> int | None:
    return lost() if callable(lost) else lost
