"""How long a training iteration takes in Chainer with these kernels, as a multiple of PyTorch's.

    python benchmarks/vs_pytorch.py [--models resnet20 ssd300] [--kernels torch] [--quick]

The models are the same on both sides (checked: the same weights give the same loss), as are loss, optimizer,
batches and number of threads. PyTorch trains with autocast to float16 and GradScaler; its float32 is there
too because few CPUs compute in float16, and without that PyTorch's float16 is no measure.
"""

from __future__ import annotations

import argparse

import numpy as np
from machine import Machine
from program import fail, time_models
from readme_tables import table
from side_by_side import Timings, rounds_within, take_turns
from workloads import FIXED, METHODS, Batch, Training, settle, workload_of

try:
    from torch_twins import TWINS, TorchTraining
except ImportError:
    fail("This compares with PyTorch, which is not installed: make setup GROUPS=torch.")

PHASES = ("forward", "backward", "update")
PYTORCH = TORCH_HALF, TORCH_SINGLE = "PyTorch float16", "PyTorch float32"
SLOW = 5
"""PyTorch's float16 takes turns with its float32 alone where it takes so many times as long."""

COMPARED = (FIXED, "approx_range", "auto")


def main() -> None:
    time_models("vs_pytorch", __doc__.split("\n\n")[0], TWINS, 180, measure)


def measure(name: str, machine: Machine, options: argparse.Namespace) -> str:
    """Time a model in both; returns the table."""
    workload, rng = workload_of(name, options), np.random.default_rng(options.seed)
    batches = workload.batches(rng, machine)
    single = Training(workload, None, machine, options.seed, dtype=np.float32)
    model = single.chain.model.model
    trainings = {
        TORCH_HALF: TorchTraining(name, model, half=True),
        TORCH_SINGLE: TorchTraining(name, model, half=False),
        "Chainer float32": single,
        **{
            f"Chainer {method}": Training(workload, METHODS[method], machine, options.seed)
            for method in COMPARED
        },
    }
    check_same_loss(trainings[TORCH_SINGLE], single, next(batches))
    settle(trainings.values(), batches)
    first = take_turns(trainings, batches, rng, rounds=1, clock=machine.clock)
    groups = [list(trainings)]
    if first.ratio(TORCH_HALF, TORCH_SINGLE).middle > SLOW:
        groups = [[name for name in trainings if name != TORCH_HALF], list(PYTORCH)]
    timings = []
    for names in groups:
        rounds = 2 if options.quick else rounds_within(options.seconds, first, names)
        group = {name: trainings[name] for name in names}
        timings.append(take_turns(group, batches, rng, rounds=rounds, clock=machine.clock))
    return f"{workload.name}, batch {workload.batchsize}\n\n{as_table(timings)}"


def check_same_loss(theirs: TorchTraining, ours: Training, batch: Batch) -> None:
    """That the models are the same, as far as their loss tells."""
    found, expected = theirs.loss(batch).item(), float(ours.chain(*batch).array)
    if not np.isclose(found, expected, rtol=1e-3):
        raise RuntimeError(f"The models differ: PyTorch's loss is {found}, Chainer's {expected}.")


def as_table(groups: list[Timings]) -> str:
    """groups: trainings that took turns; those in several count with their first."""
    half = next(np.median(timings.seconds(TORCH_HALF)) for timings in groups if TORCH_HALF in timings.rounds)
    rows: dict[str, list[str]] = {}
    for timings in groups:
        for name in timings.rounds:
            low, middle, high = timings.ratio(name, TORCH_SINGLE)
            phases, total = timings.phases(name), np.median(timings.seconds(name))
            milliseconds = [
                f"{1000 * seconds:.1f}" for seconds in (total, *(phases[phase] for phase in PHASES))
            ]
            ratios = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{total / half:.2f}"]
            rows.setdefault(name, [name, str(len(timings.rounds[name])), *milliseconds, *ratios])
    header = ["training", "iterations", "ms", *PHASES, f"to {TORCH_SINGLE}", "quartiles", f"to {TORCH_HALF}"]
    return table(header, list(rows.values()))


if __name__ == "__main__":
    main()
