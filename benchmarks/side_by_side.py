"""Times programs side by side: they take turns, so that a noisy machine disturbs them alike.

Every turn draws a fresh batch and hands it to every program once, in an order drawn anew. Several turns make
a round, whose sums are compared: what a program does only every few turns counts with its share. Ratios are
those of sums of the same round, and of them the median and the quartiles are reported.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

Program = Callable[[Any], Iterable[str]]
"""Works on a batch; after each of its phases it yields the phase's name."""

Seconds = dict[str, float]
"""By phase."""


class Clock(Protocol):
    """What a machine tells the time with."""

    def mark(self) -> Any:
        """Note this moment."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one moment to another."""


class HostClock:
    """The processor's own clock: a phase ends when its last call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start


class Quartiles(NamedTuple):
    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        return cls(*(float(value) for value in np.percentile(list(values), [25, 50, 75])))


@dataclass(frozen=True)
class Timings:
    """Mean seconds of a turn in every round, by program and phase."""

    rounds: Mapping[str, list[Seconds]]

    def seconds(self, program: str, phase: str | None = None) -> list[float]:
        """By round; of all phases together unless one is named."""
        return [sum(taken.values()) if phase is None else taken[phase] for taken in self.rounds[program]]

    def ratio(self, program: str, baseline: str) -> Quartiles:
        """How many times as long as the baseline a program takes."""
        return Quartiles.of(map(_divided, self.seconds(program), self.seconds(baseline)))

    def excess(self, program: str, baseline: str) -> Quartiles:
        """How many seconds longer than the baseline a program takes."""
        return Quartiles.of(map(_subtracted, self.seconds(program), self.seconds(baseline)))

    def phases(self, program: str) -> Seconds:
        """Median seconds of every phase."""
        return {phase: float(np.median(self.seconds(program, phase))) for phase in self.rounds[program][0]}


def take_turns(
    programs: Mapping[str, Program],
    batches: Iterator[Any],
    rng: np.random.Generator,
    *,
    rounds: int,
    turns: int = 1,
    clock: Clock | None = None,
) -> Timings:
    """Time the programs on the same batches; they have run before, so that nothing happens for the first
    time.

    rounds: how often to measure. turns: of every round.
    """
    clock = clock or HostClock()
    taken: dict[str, list[Seconds]] = {name: [] for name in programs}
    for _ in range(rounds):
        sums: dict[str, Counter[str]] = {name: Counter() for name in programs}
        for batch in islice(batches, turns):
            for name in rng.permutation(list(programs)):
                sums[name].update(time_phases(programs[name], batch, clock))
        for name, found in sums.items():
            taken[name].append({phase: seconds / turns for phase, seconds in found.items()})
    return Timings(taken)


def rounds_within(seconds: float, first: Timings, programs: Iterable[str] | None = None) -> int:
    """How many rounds of one turn of these programs (default: all) fit into a time, by a first one; at least
    3."""
    turn = sum(first.seconds(name)[0] for name in programs or first.rounds)
    return max(3, round(seconds / turn))


def run(program: Program, batch: Any) -> None:
    """All phases of a program on one batch."""
    for _ in program(batch):
        pass


def time_phases(program: Program, batch: Any, clock: Clock) -> Seconds:
    """Seconds that a program spends in each of its phases on one batch."""
    marks, names = [clock.mark()], []
    for name in program(batch):
        marks.append(clock.mark())
        names.append(name)
    return {name: clock.between(*marks[place : place + 2]) for place, name in enumerate(names)}


def _divided(a: float, b: float) -> float:
    return a / b


def _subtracted(a: float, b: float) -> float:
    return a - b
