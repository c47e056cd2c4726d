"""How much memory training takes under every way of scaling, as a multiple of fixed loss scaling.

    python benchmarks/memory.py [--models small resnet20 mlp100 ssd300] [--kernels auto] [--quick]

Every figure comes from a process of its own, and from ten iterations after entry scales have settled. Traced
is the peak of what Python and NumPy hold during an iteration, network, optimizer and batch included; process
is the peak of what the operating system gave, with all libraries and the start. On a GPU it is the peak of
CuPy's pool.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from machine import this_machine
from program import chosen, parser, start
from readme_tables import table
from side_by_side import run
from workloads import CYCLE, FIXED, METHODS, WORKLOADS, Training, settle, workload_of

from ada_loss.chainer import kernels

from chainer.backends import cuda  # isort: skip  (made importable by the above)

MIB = 2**20
QUICK = (FIXED, "approx_range")
"""Methods that a quick run compares."""


def main() -> None:
    options = arguments()
    report = start("memory", options)
    on_gpu = report.machine.device.xp is not np
    meters: dict[str, Meter] = (
        {"pool": pool_peak} if on_gpu else {"traced": traced_peak, "process": process_peak}
    )
    for name in chosen(options, WORKLOADS):
        workload = workload_of(name, options)
        peaks = {
            method: {kind: in_fresh_process(meter, name, method, options) for kind, meter in meters.items()}
            for method in (QUICK if options.quick else METHODS)
        }
        report.add(f"{workload.name}, batch {workload.batchsize}\n\n{as_table(peaks)}")
    if not options.quick and not options.models:
        report.write()


def arguments() -> argparse.Namespace:
    return parser(__doc__.split("\n\n")[0], WORKLOADS).parse_args()


def as_table(peaks: dict[str, dict[str, int]]) -> str:
    kinds = list(peaks[FIXED])
    rows = [
        [method, *(f"{found[kind] / MIB:.1f}" for kind in kinds)]
        + [f"{found[kind] / peaks[FIXED][kind]:.3f}" for kind in kinds]
        for method, found in peaks.items()
    ]
    header = [f"{kind} MiB" for kind in kinds] + [f"{kind} to fixed" for kind in kinds]
    return table(["method", *header], rows)


Train = Callable[[Callable[[], None]], None]
"""Trains, and calls what it is given once training has settled."""

Meter = Callable[[Train], int]
"""Runs a training; returns the peak of the memory in bytes."""


def in_fresh_process(meter: Meter, model: str, method: str, options: argparse.Namespace) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (meter, model, method, options))


def measure(meter: Meter, model: str, method: str, options: argparse.Namespace) -> int:
    """The peak of training by a method, in this process, which has done nothing else."""
    kernels.use(options.kernels)

    def train(settled: Callable[[], None]) -> None:
        machine, workload = this_machine(), workload_of(model, options)
        training = Training(workload, METHODS[method], machine, options.seed)
        batches = workload.batches(np.random.default_rng(options.seed), machine)
        settle([training], batches)
        settled()
        for batch in islice(batches, 1 if options.quick else CYCLE):
            run(training, batch)

    return meter(train)


def traced_peak(train: Train) -> int:
    tracemalloc.start()
    train(tracemalloc.reset_peak)
    return tracemalloc.get_traced_memory()[1]


def process_peak(train: Train) -> int:
    train(lambda: None)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # What getrusage tells on Linux includes the process that started this one.
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def pool_peak(train: Train) -> int:
    """CuPy's pool keeps what it once took."""
    train(cuda.memory_pool.free_all_blocks)
    return cuda.memory_pool.total_bytes()


if __name__ == "__main__":
    main()
