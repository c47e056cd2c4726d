"""How long a mixed16 training iteration takes, as a multiple of plain Chainer's float32 iteration.

    python benchmarks/mixed16_ratio.py [--models small ssd300] [--kernels auto] [--quick]

Chainer's float32 runs on Chainer's own kernels. All models start from the same weights and take turns on the
same fresh random batches. Iteration means forward, loss, backward and update.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from machine import Machine
from program import time_models
from readme_tables import table
from side_by_side import Program, Timings, rounds_within, take_turns
from workloads import FIXED, METHODS, Batch, Training, settle, workload_of

from ada_loss.chainer import kernels

MODELS = ("small", "ssd300")
BASELINE = "float32, Chainer's kernels"
COMPARED = (FIXED, "approx_range", "auto")


def main() -> None:
    time_models("mixed16_ratio", __doc__.split("\n\n")[0], MODELS, 120, measure)


def measure(name: str, machine: Machine, options: argparse.Namespace) -> str:
    """Time a model in both; returns the table."""
    workload, rng = workload_of(name, options), np.random.default_rng(options.seed)
    batches = workload.batches(rng, machine)
    single = Training(workload, None, machine, options.seed, dtype=np.float32)
    mixed = {
        f"mixed16, {method}": Training(workload, METHODS[method], machine, options.seed)
        for method in COMPARED
    }
    settle(mixed.values(), batches)
    programs = {BASELINE: on_kernels("chainer", single), **mixed}
    first = take_turns(programs, batches, rng, rounds=1, clock=machine.clock)
    rounds = 2 if options.quick else rounds_within(options.seconds, first)
    timings = take_turns(programs, batches, rng, rounds=rounds, clock=machine.clock)
    return f"{workload.name}, batch {workload.batchsize}: {rounds} iterations\n\n{as_table(timings)}"


def on_kernels(provider: str, program: Program) -> Program:
    """The program on other kernels than those of the process."""

    def run(batch: Batch) -> Iterator[str]:
        with kernels.using(provider):
            yield from program(batch)

    return run


def as_table(timings: Timings) -> str:
    rows = []
    for name in timings.rounds:
        low, middle, high = timings.ratio(name, BASELINE)
        seconds = float(np.median(timings.seconds(name)))
        rows.append([name, f"{1000 * seconds:.1f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    return table(["training", "ms/iteration", "ratio", "quartiles"], rows)


if __name__ == "__main__":
    main()
