"""What adaptive scaling adds to an iteration with fixed scaling, against the model's sizes and the number of
ranks.

    python benchmarks/scaling.py [--kernels auto] [--quick]

The models are perceptrons. Each series lets one size grow, and a line is fitted through what adaptive scaling
adds: start + slope * size. The ranks, started by mpiexec, train ResNet-20 each on a batch of its own, with
one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import Machine, this_machine
from program import parser, start
from readme_tables import table
from side_by_side import Timings, rounds_within, take_turns
from workloads import FIXED, METHODS, Training, Workload, mlp, resnet20, settle

from ada_loss.chainer import kernels

ADAPTIVE = "approx_range"
RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Series:
    """Perceptrons of growing size. unit: what the size counts."""

    title: str
    unit: str
    sizes: dict[int, Workload]


SERIES = (
    Series("Depth: layers of 64, batch 32", "layer", {n: mlp(n, 64, 32) for n in (10, 20, 40, 80)}),
    Series("Width: 10 layers, batch 2048", "unit", {n: mlp(10, n, 2048) for n in (32, 64, 128, 256)}),
    Series("Batch: 10 layers of 64", "sample", {n: mlp(10, 64, n) for n in (256, 1024, 2048, 4096)}),
    Series(
        "Parameters: 10 layers, batch 8",
        "parameter",
        {9 * n * n + 19 * n + 10: mlp(10, n, 8) for n in (256, 512, 768, 1024)},
    ),
)


def main() -> None:
    options = arguments()
    if options.as_rank:
        kernels.use(options.kernels)
        measure_as_rank(options)
        return
    report = start("scaling", options)
    for series in SERIES:
        report.add(measure_series(series, report.machine, options))
    if report.machine.device.xp is np:
        report.add(measure_ranks(options))
    if not options.quick:
        report.write()


def arguments() -> argparse.Namespace:
    made = parser(__doc__.split("\n\n")[0])
    made.add_argument("--seconds", type=float, default=20, help="for each size, about (default: %(default)s)")
    made.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return made.parse_args()


def measure_series(series: Series, machine: Machine, options: argparse.Namespace) -> str:
    """Time every size; returns the table and the line."""
    rows, added = [], []
    sizes = list(series.sizes)[:2] if options.quick else list(series.sizes)
    for size in sizes:
        timings = compare(series.sizes[size], machine, options)
        added.append(1000 * timings.excess(ADAPTIVE, FIXED).middle)
        rows.append([f"{size:,}", *_times(timings)])
    slope, start = np.polyfit(sizes, added, 1)
    off = max(abs(np.polyval([slope, start], sizes) - added)) / max(map(abs, added))
    return (
        f"{series.title}\n\n{table([f'{series.unit}s', *COLUMNS], rows)}\n\n"
        f"Added: {start:.2f} ms + {1e3 * slope:.3g} µs per {series.unit}; "
        f"the points are off that line by at most {off:.0%} of the largest."
    )


COLUMNS = (f"{FIXED} ms", f"{ADAPTIVE} ms", "added ms", "quartiles", "ratio")


def _times(timings: Timings) -> list[str]:
    low, middle, high = (1000 * seconds for seconds in timings.excess(ADAPTIVE, FIXED))
    return [
        *(f"{1000 * np.median(timings.seconds(name)):.2f}" for name in (FIXED, ADAPTIVE)),
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{timings.ratio(ADAPTIVE, FIXED).middle:.3f}",
    ]


def compare(workload: Workload, machine: Machine, options: argparse.Namespace) -> Timings:
    rng = np.random.default_rng(options.seed)
    batches = workload.batches(rng, machine)
    trainings = {name: Training(workload, METHODS[name], machine, options.seed) for name in (FIXED, ADAPTIVE)}
    settle(trainings.values(), batches)
    first = take_turns(trainings, batches, rng, rounds=1, clock=machine.clock)
    rounds = 2 if options.quick else rounds_within(options.seconds, first)
    return take_turns(trainings, batches, rng, rounds=rounds, clock=machine.clock)


def measure_ranks(options: argparse.Namespace) -> str:
    """Time 1, 2 and 4 ranks; returns the table."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        return "Ranks: not measured, there is no mpiexec."
    rows, workload = [], rank_workload(options)
    for ranks in (2,) if options.quick else RANKS:
        found = in_ranks([mpiexec, "-n", str(ranks)], options)
        timings = Timings(found["rounds"])
        rows.append([ranks, *_times(timings), f"{found['gradients']:,}", f"{found['agreement']:,}"])
    header = ["ranks", *COLUMNS, "bytes of gradients", "bytes of agreement"]
    return f"Ranks: {workload.name}, batch {workload.batchsize} each\n\n{table(header, rows)}"


def in_ranks(launcher: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run this program once per rank; returns what rank 0 found."""
    given = ["--as-rank", "--seconds", options.seconds, "--seed", options.seed, "--kernels", options.kernels]
    command = [*launcher, sys.executable, __file__, *map(str, given), *(["--quick"] if options.quick else [])]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **one_thread}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def rank_workload(options: argparse.Namespace) -> Workload:
    return mlp(4, 32, 8) if options.quick else resnet20(8)


def measure_as_rank(options: argparse.Namespace) -> None:
    """What every rank does; rank 0 prints the timings and the bytes that a step of adaptive scaling sends
    from it."""
    import chainermn
    from bytes_sent import CountingComm
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    counters = {name: CountingComm(world) for name in (FIXED, ADAPTIVE)}
    machine, workload = this_machine(), rank_workload(options)

    def training(name: str) -> Training:
        communicator = chainermn.create_communicator("naive", mpi_comm=counters[name])
        return Training(
            workload, METHODS[name], machine, options.seed,
            multi_node=lambda optimizer: chainermn.create_multi_node_optimizer(optimizer, communicator),
        )  # fmt: skip

    trainings = {name: training(name) for name in counters}
    batches = workload.batches(np.random.default_rng([options.seed, world.rank]), machine)
    settle(trainings.values(), batches)
    order = np.random.default_rng(options.seed)
    first = take_turns(trainings, batches, order, rounds=1)
    rounds = world.bcast(2 if options.quick else rounds_within(options.seconds, first))
    before = counters[ADAPTIVE].sent
    timings = take_turns(trainings, batches, order, rounds=rounds)
    if world.rank == 0:
        sent = {kind: (now - before[kind]) // rounds for kind, now in counters[ADAPTIVE].sent.items()}
        print(json.dumps({"rounds": timings.rounds, **sent}))


if __name__ == "__main__":
    main()
