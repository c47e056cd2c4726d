"""Measures how good float16 gradients are under each way to scale them.

    python benchmarks/fidelity.py [--quick] [--models NAME ...] [--seed N] [--out DIR]

Networks at initialization and after some training, their loss multiplied by 2^m; per parameter the
signal-to-noise ratio against float32 and the share of elements that underflowed. Writes a table, a plot and
JSON.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fidelity_cases import CASES, Case, use_ssd_example
from fidelity_measure import (
    Quality,
    Subject,
    Sweep,
    adaptive_backward,
    compare,
    make_subject,
    plain_backward,
    sweep,
)
from fidelity_report import ORACLE, Cell, document, write

from ada_loss.chainer import AdaLossScaled, kernels

MULTIPLIERS = range(-30, 15, 4)
"""log2 of what the loss is multiplied by."""

ORACLE_SCALES = range(-16, 41)
"""log2 of the fixed scales that are tried to find the best."""

DYNAMIC_SCALES = range(16)
"""log2 of the scales that Chainer's dynamic scaling goes through, doubling from 1 and at most 65504."""

ADAPTIVE = {"paper": "approx_range", "auto": "auto"}
QUICK = ("mlp20", "lstm", "transformer")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    use_ssd_example()
    names = options.models or (QUICK if options.quick else tuple(CASES))
    multipliers = MULTIPLIERS[::3] if options.quick else MULTIPLIERS
    cells: list[Cell] = []
    for name in names:
        cells += measure_case(CASES[name], options.seed, multipliers)
    settings = {"seed": options.seed, "m": f"{multipliers[0]} to {multipliers[-1]} by {multipliers.step}"}
    write(options.out, cells, settings)
    print(document(cells, settings))
    return 0


def measure_case(case: Case, seed: int, multipliers: range) -> Iterator[Cell]:
    """All cells of a network, untrained and trained."""
    # Plain models, which come first, run on the kernels of scaled ones.
    kernels.use_by_default("numpy")
    for stage, steps in (("initial", 0), ("trained", case.steps)):
        begin = time.monotonic()
        subject = make_subject(case, seed, steps)
        scales = sweep(plain_backward(case, subject.model, subject.batch), subject.reference)
        yield from fixed_cells(case.name, stage, scales, multipliers)
        yield from adaptive_cells(case.name, stage, subject, scales, multipliers)
        print(f"{case.name} {stage}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def fixed_cells(model: str, stage: str, scales: Sweep, multipliers: range) -> Iterator[Cell]:
    """Cells of the methods with one scale for the whole network."""
    for m in multipliers:
        best = max(ORACLE_SCALES, key=lambda scale, m=m: _worst_snr(scales.at(m + scale)))
        for method, scale in (("none", 0), ("dynamic", settled_scale(scales, m)), (ORACLE, best)):
            yield _cell(model, stage, m, method, scales.at(m + scale), scale)


def adaptive_cells(
    model: str, stage: str, subject: Subject, scales: Sweep, multipliers: range
) -> Iterator[Cell]:
    """Cells of our own methods, each without any setting changed."""
    for method, rule in ADAPTIVE.items():
        scaled = AdaLossScaled(copy.deepcopy(subject.model), loss_scale_method=rule)
        gradients = adaptive_backward(subject.case, scaled, subject.batch)
        for m in multipliers:
            yield _cell(model, stage, m, method, compare(gradients(m), subject.reference, scales.keepable))


def settled_scale(scales: Sweep, m: int) -> int:
    """log2 of where dynamic scaling ends up: the largest scale without overflow, 1 if there is none."""
    safe = [s for s in DYNAMIC_SCALES if _worst_snr(scales.at(m + s)) > -math.inf]
    return max(safe, default=0)


def _worst_snr(qualities: dict[str, Quality]) -> float:
    return min(quality.snr for quality in qualities.values())


def _cell(
    model: str, stage: str, m: int, method: str, qualities: dict[str, Quality], scale: int | None = None
) -> Cell:
    worst = min(qualities, key=lambda path: qualities[path].snr)
    lost = max(qualities, key=lambda path: qualities[path].underflow)
    return Cell(
        model=model,
        stage=stage,
        m=m,
        method=method,
        snr=qualities[worst].snr,
        worst_parameter=worst,
        underflow=qualities[lost].underflow,
        underflow_parameter=lost,
        overflowed=sum(quality.snr == -math.inf for quality in qualities.values()),
        parameters=len(qualities),
        log2_scale=scale,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three small networks and every third m")
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/fidelity"), help="folder for the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
