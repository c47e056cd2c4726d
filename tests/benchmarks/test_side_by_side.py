"""Taking turns, with a clock that the programs themselves wind on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from side_by_side import Program, Quartiles, Timings, rounds_within, take_turns, time_phases


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def spending(clock: FakeClock, log: list[tuple[str, int]], name: str, **seconds: float) -> Program:
    """A program whose phases take so long, times the batch."""

    def program(batch: int) -> Iterator[str]:
        log.append((name, batch))
        for phase, spent in seconds.items():
            clock.now += spent * batch
            yield phase

    return program


def test_every_program_works_once_on_every_batch(clock: FakeClock) -> None:
    log: list[tuple[str, int]] = []
    programs = {name: spending(clock, log, name, all=1) for name in "abc"}
    take_turns(programs, count(1), np.random.default_rng(3), rounds=4, turns=5, clock=clock)
    assert sorted(log) == sorted((name, batch) for name in "abc" for batch in range(1, 21))
    assert [batch for _, batch in log] == sorted(batch for _, batch in log)


def test_the_order_within_a_turn_changes(clock: FakeClock) -> None:
    log: list[tuple[str, int]] = []
    programs = {name: spending(clock, log, name, all=1) for name in "abc"}
    take_turns(programs, count(1), np.random.default_rng(4), rounds=30, clock=clock)
    orders = {tuple(name for name, batch in log if batch == turn) for turn in range(1, 31)}
    assert len(orders) == 6


def test_a_round_counts_all_its_turns(clock: FakeClock) -> None:
    """What takes long only every fifth turn shows with a fifth of it."""
    lengths = [1, 1, 1, 1, 6] * 3
    programs = {"uneven": spending(clock, [], "uneven", forward=0.5, backward=1.5)}
    timings = take_turns(programs, iter(lengths), np.random.default_rng(5), rounds=3, turns=5, clock=clock)
    assert timings.seconds("uneven") == pytest.approx([4, 4, 4])
    assert timings.phases("uneven") == pytest.approx({"forward": 1, "backward": 3})


def test_ratios_compare_what_belongs_to_the_same_round() -> None:
    rng = np.random.default_rng(6)
    load = rng.uniform(1, 10, 21)
    timings = Timings({"a": [{"all": t} for t in load], "b": [{"all": 3 * t} for t in load]})
    assert timings.ratio("b", "a") == pytest.approx((3, 3, 3))
    assert timings.excess("b", "a") == pytest.approx(Quartiles.of(2 * load))


def test_phases_are_timed_apart(clock: FakeClock) -> None:
    program = spending(clock, [], "p", forward=1, backward=2, update=0.25)
    assert time_phases(program, 2, clock) == {"forward": 2, "backward": 4, "update": 0.5}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (100.0, 20), (9.0, 3)])
def test_rounds_fill_the_time_but_are_at_least_three(seconds: float, rounds: int) -> None:
    first = Timings({"a": [{"all": 2.0}], "b": [{"all": 3.0}]})
    assert rounds_within(seconds, first) == rounds


def test_rounds_of_some_programs_only_count_those() -> None:
    first = Timings({"a": [{"all": 2.0}], "b": [{"all": 300.0}]})
    assert rounds_within(100, first, ["a"]) == 50
