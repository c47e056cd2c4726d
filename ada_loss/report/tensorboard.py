"""The records of a run as TensorBoard's scalars and histograms, where it is installed."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from ada_loss.core.histogram import Histogram
from ada_loss.report.facts import RunFacts

WRITERS = ("torch.utils.tensorboard", "tensorboardX")
"""Where a SummaryWriter may come from."""


def summary_writer() -> Any:
    """The class `SummaryWriter`.

    Raises:
        ImportError: where there is none.
    """
    for name in WRITERS:
        try:
            return importlib.import_module(name).SummaryWriter
        except ImportError:
            continue
    raise ImportError(
        "TensorBoard is not installed: pip install tensorboard, beside PyTorch, or tensorboardX."
    )


def export(facts: RunFacts, directory: Path) -> None:
    """Write a run into a directory for TensorBoard: losses and metrics, and for every place its
    largest element, the scale that it carried, what was lost, and a histogram of log2 of the magnitudes."""
    writer = summary_writer()(str(directory))
    try:
        for step in facts.run.steps:
            scalars = {"loss": step.loss, "scale/exponent": step.exponent, "skipped": step.skipped_so_far}
            for name, value in {**scalars, **step.metrics}.items():
                if value is not None:
                    writer.add_scalar(name, value, step.step)
        for record in facts.run.places:
            tag = f"{record.place.path.strip('/') or 'model'}/{record.place.kind.replace(' ', '_')}"
            truth = record.reference or record.histogram
            writer.add_scalar(f"{tag}/exponent", record.exponent, record.step)
            writer.add_scalar(f"{tag}/largest", truth.largest, record.step)
            if record.lost is not None and truth.nonzero:
                writer.add_scalar(f"{tag}/lost", record.lost / truth.nonzero, record.step)
            if truth.nonzero:
                writer.add_histogram_raw(tag, global_step=record.step, **raw_histogram(truth))
    finally:
        writer.close()


def raw_histogram(histogram: Histogram) -> dict[str, Any]:
    """What TensorBoard wants to know of a histogram: over log2 of the magnitudes, in even bins."""
    middles = [exponent + 0.5 for exponent in range(histogram.lowest, histogram.highest + 1)]
    weighted = list(zip(middles, histogram.counts, strict=True))
    return {
        "min": float(histogram.lowest),
        "max": math.log2(histogram.largest),
        "num": histogram.nonzero,
        "sum": math.fsum(middle * count for middle, count in weighted),
        "sum_squares": math.fsum(middle**2 * count for middle, count in weighted),
        "bucket_limits": [float(exponent + 1) for exponent in range(histogram.lowest, histogram.highest + 1)],
        "bucket_counts": list(histogram.counts),
    }
