"""What a page, a table or a log says of runs: figures drawn from their records, before anything is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_low

from ada_loss.core import formats
from ada_loss.core.formats import FLOAT16, FloatFormat
from ada_loss.core.record_file import Run, read
from ada_loss.core.records import ACTIVATION, Place, PlaceRecord, StepRecord
from ada_loss.core.verdicts import (
    PlaceSummary,
    Word,
    common_window,
    gradients,
    model_sentence,
    percent,
    power,
    scale_sentence,
    summarize,
)
from ada_loss.core.windows import Window, intersect

FIXED = 7
"""The exponent of the usual fixed scale, 128."""


@dataclass(frozen=True)
class Layer:
    """The gradients of one module together.

    places: its input gradient and those of its parameters. lost: the largest share that any of them lost in
    this run; None where that was not measured.
    """

    path: str
    places: tuple[PlaceSummary, ...]
    lost: float | None

    @cached_property
    def window(self) -> Window:
        """The scales that suit all of them."""
        return intersect(place.window for place in self.places)

    @cached_property
    def needs(self) -> PlaceSummary:
        """The place that needs the largest scale."""
        return max(self.places, key=lambda place: place.window.lowest)

    @cached_property
    def bears(self) -> PlaceSummary:
        """The place that overflows first."""
        return min(self.places, key=lambda place: place.window.highest)

    @property
    def trained(self) -> bool:
        """Whether there is any gradient."""
        return any(place.truth.nonzero for place in self.places)

    def underflow(self, exponent: int) -> float:
        """The largest share of any of its gradients that underflows at the scale 2**exponent."""
        return max(place.truth.underflow(exponent, place.number_format) for place in self.places)


@dataclass(frozen=True)
class Line:
    """A single scale, drawn across all windows. kind: none, fixed, dynamic or predicted."""

    name: str
    exponent: int
    kind: str


@dataclass(frozen=True)
class RunFacts:
    """A run under the name that tells it from the others."""

    name: str
    run: Run

    @cached_property
    def number_format(self) -> FloatFormat:
        """In which gradients are stored."""
        known = {value.name: value for value in vars(formats).values() if isinstance(value, FloatFormat)}
        return known.get(self.run.header.number_format, FLOAT16)

    @cached_property
    def places(self) -> list[PlaceSummary]:
        """Every place, in the order in which it was first met."""
        return summarize(self.run.places, self.run.steps, self.number_format)

    @cached_property
    def by_place(self) -> dict[Place, list[PlaceRecord]]:
        """What was recorded of every place."""
        found: dict[Place, list[PlaceRecord]] = {}
        for record in self.run.places:
            found.setdefault(record.place, []).append(record)
        return found

    @cached_property
    def gradients(self) -> list[PlaceSummary]:
        """The places of the backward pass."""
        return gradients(self.places)

    @cached_property
    def layers(self) -> list[Layer]:
        """The modules that have gradients, in the order of the forward pass as far as it is known."""
        by_path: dict[str, list[PlaceSummary]] = {}
        for place in self.gradients:
            by_path.setdefault(place.place.layer, []).append(place)
        forward = [place.place.path for place in self.places if place.place.kind == ACTIVATION]
        order = {path: number for number, path in enumerate(dict.fromkeys(forward))}
        # Backward meets the layers in the opposite order.
        met = {path: -number for number, path in enumerate(by_path)}
        paths = sorted(by_path, key=lambda path: met[path])
        if order.keys() >= by_path.keys():
            paths.sort(key=lambda path: order[path])
        return [Layer(path, tuple(by_path[path]), self._lost(by_path[path])) for path in paths]

    def _lost(self, places: Sequence[PlaceSummary]) -> float | None:
        measured = [place.lost for place in places if place.lost is not None]
        if measured or not self.adaptive:
            return max(measured, default=None)
        return max(place.faint for place in places)

    @property
    def adaptive(self) -> bool:
        """Whether places have scales of their own."""
        return self.run.header.adaptive

    @cached_property
    def measured(self) -> bool:
        """Whether the run tells what it has lost: by a float32 reference, or because it hardly loses."""
        return self.adaptive or any(place.lost is not None for place in self.places)

    @cached_property
    def window(self) -> Window:
        """The single scales that suit every gradient."""
        return common_window(self.places)

    @cached_property
    def sentence(self) -> str:
        """What can be said of the model."""
        return model_sentence(self.places)

    @cached_property
    def settled(self) -> int | None:
        """The exponent around which a dynamic scale has settled, None if this run's never moved."""
        exponents = [step.exponent for step in self.run.steps]
        if self.adaptive or len(set(exponents)) < 2:
            return None
        return median_low(exponents[len(exponents) // 2 :])

    @cached_property
    def skips(self) -> list[StepRecord]:
        """Steps that were skipped."""
        return [step for step in self.run.steps if step.skipped]

    @property
    def skipped(self) -> int:
        """How many steps were skipped, those that were only counted included."""
        return max((step.skipped_so_far for step in self.run.steps), default=0)

    @cached_property
    def sampled(self) -> list[int]:
        """The steps whose places were recorded."""
        return sorted({record.step for record in self.run.places})

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        steps = [step.step for step in self.run.steps[-1:]] + self.sampled[-1:]
        return max(steps, default=0)

    @property
    def outcome(self) -> str:
        """How it ended, or how far it is."""
        if self.run.end is not None:
            return f"{self.run.end.outcome} after {self.run.end.step} steps"
        total = f" of {self.run.header.total}" if self.run.header.total else ""
        return f"no end recorded: goes on or stopped at step {self.last_step}{total}"

    @cached_property
    def scales(self) -> tuple[int, int]:
        """The smallest and the largest exponent that any gradient carried."""
        exponents = [e for place in self.gradients for e in (place.lowest_exponent, place.highest_exponent)]
        return min(exponents, default=0), max(exponents, default=0)

    @cached_property
    def verdicts(self) -> Counter[Word]:
        """How many places have each verdict."""
        return Counter(place.verdict.word for place in self.places)

    def summary(self) -> list[str]:
        """The run in five lines."""
        low, high = self.scales
        return [
            self.sentence,
            f"Scales from {power(low)} to {power(high)}; " + self._plain_losses(),
            self._own_losses(),
            self._skips(),
            f"{self.name}: {self.outcome}, {len(self.sampled)} of them sampled.",
        ]

    def _plain_losses(self) -> str:
        lossy = sorted(self.layers, key=lambda layer: -layer.underflow(0))
        named = [
            f"{percent(layer.underflow(0))} of {layer.path}" for layer in lossy if layer.underflow(0) > 1e-3
        ]
        if not named:
            return "without any, no layer would lose much."
        more = f" and much of {len(named) - 3} more" if len(named) > 3 else ""
        return f"without any, float16 would lose {', '.join(named[:3])}{more}."

    def _own_losses(self) -> str:
        if not self.measured:
            return "What this run lost is unknown: it holds no float32 reference."
        lossy = [layer for layer in self.layers if (layer.lost or 0) > 1e-3]
        if not lossy:
            return "No layer lost more than 0.1 % of its gradients."
        worst = max(lossy, key=lambda layer: layer.lost or 0)
        most = f"most of all {worst.path}, {percent(worst.lost or 0)}"
        return f"{len(lossy)} of {len(self.layers)} layers lost more than 0.1 % of a gradient, {most}."

    def _skips(self) -> str:
        if not self.skipped:
            return "No step was skipped."
        began = Counter(step.began for step in self.skips if step.began is not None)
        where = ", ".join(f"{_short(place)} ({count})" for place, count in began.most_common(3))
        return f"Skipped {self.skipped} steps" + (f"; known to have begun in {where}." if where else ".")


def _short(place: Place) -> str:
    return f"{place.path}, forward" if place.kind == ACTIVATION else place.path


def load(paths: Sequence[str | Path]) -> list[RunFacts]:
    """The runs at some paths, each under a name of its own.

    Raises:
        RecordError: where one holds no records.
    """
    runs = [read(path) for path in paths]
    taken = Counter(run.header.name for run in runs)
    facts, used = [], Counter[str]()
    for run in runs:
        name = run.header.name
        if taken[name] > 1:
            name = f"{name} ({run.path.parent.name or run.path.name})"
        used[name] += 1
        facts.append(RunFacts(name if used[name] == 1 else f"{name} {used[name]}", run))
    return facts


def best_of(runs: Sequence[RunFacts]) -> RunFacts:
    """The run that knows most of the true gradients: the one with the fewest lost."""

    def quality(facts: RunFacts) -> tuple[bool, bool, float]:
        lost = [layer.lost for layer in facts.layers if layer.lost is not None]
        return not facts.layers, not facts.measured, max(lost, default=0.0)

    return min(runs, key=quality)


def lines(facts: RunFacts, runs: Sequence[RunFacts]) -> list[Line]:
    """The single scales to compare with a run's windows: none, fixed 128, and where dynamic ones settled."""
    found = [Line("no scaling", 0, "none"), Line("fixed 128", FIXED, "fixed")]
    settled = [(run.name, run.settled) for run in runs if run.settled is not None]
    found += [
        Line(f"{name} settled", exponent, "dynamic") for name, exponent in settled if exponent is not None
    ]
    if not settled and math.isfinite(facts.window.highest):
        found.append(Line("dynamic would climb", int(facts.window.highest), "predicted"))
    return found


def line_sentence(facts: RunFacts, line: Line) -> str:
    """What a single scale would do to a run's gradients."""
    scale = power(line.exponent)
    name = {
        "dynamic": f"{line.name} at {scale}, which",
        "predicted": f"a dynamic scale would climb to {scale}, which",
    }.get(line.kind, f"{line.name} ({scale})")
    sentence = scale_sentence(facts.places, line.exponent, name)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def best_single(facts: RunFacts) -> tuple[int, int]:
    """The single scale that suits most layers, the one in the middle of several, and how many it does not."""
    windows = [layer.window for layer in facts.layers if layer.trained]
    ends = [int(end) for window in windows for end in (window.lowest, window.highest) if math.isfinite(end)]
    if not ends:
        return 0, 0
    missed = {k: sum(k not in window for window in windows) for k in range(min(ends), max(ends) + 1)}
    fewest = min(missed.values())
    best = [k for k, count in missed.items() if count == fewest]
    return best[len(best) // 2], fewest
