"""How long a training iteration takes under every way of scaling, as a multiple of fixed loss scaling.

    python benchmarks/step_time.py [--models small resnet20 mlp100 ssd300] [--kernels auto] [--quick]

Iteration means forward and loss, backward, update. All networks of a kind start from the same weights and
take turns on the same fresh random batches with the same kernels. A round has ten iterations of each.
"""

from __future__ import annotations

import argparse

import numpy as np
from machine import Machine
from program import time_models
from readme_tables import table
from side_by_side import Timings, rounds_within, take_turns
from workloads import CYCLE, FIXED, METHODS, WORKLOADS, Training, settle, workload_of

PHASES = ("forward", "backward", "update")


def main() -> None:
    time_models("step_time", __doc__.split("\n\n")[0], WORKLOADS, 300, measure)


def measure(name: str, machine: Machine, options: argparse.Namespace) -> str:
    """Time a workload under every method; returns the table."""
    workload, rng = workload_of(name, options), np.random.default_rng(options.seed)
    batches = workload.batches(rng, machine)
    trainings = {
        name: Training(workload, settings, machine, options.seed) for name, settings in METHODS.items()
    }
    settle(trainings.values(), batches)
    settled = {name: training.skipped for name, training in trainings.items()}
    turns, rounds = 1, 2
    if not options.quick:
        first = take_turns(trainings, batches, rng, rounds=1, clock=machine.clock)
        turns, rounds = CYCLE, rounds_within(options.seconds / CYCLE, first)
    timings = take_turns(trainings, batches, rng, rounds=rounds, turns=turns, clock=machine.clock)
    skipped = sum(training.skipped - settled[name] for name, training in trainings.items())
    return (
        f"{workload.name}, batch {workload.batchsize}: {rounds} rounds of {turns} iterations, "
        f"{skipped} of them without an update because of an overflow\n\n{as_table(timings)}"
    )


def as_table(timings: Timings) -> str:
    rows = []
    for name in timings.rounds:
        low, middle, high = timings.ratio(name, FIXED)
        phases = timings.phases(name)
        total = np.median(timings.seconds(name))
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in (total, *(phases[phase] for phase in PHASES))]
        rows.append([name, *milliseconds, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    return table(["method", "ms/iteration", *PHASES, "ratio to fixed", "quartiles"], rows)


if __name__ == "__main__":
    main()
