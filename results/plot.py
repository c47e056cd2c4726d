"""The pictures of results/README.md: mAP of every run, and learning curves; a panel per table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from experiments import Row, Table  # noqa: E402

POINT, MEAN = "#4363d8", "#e6194b"

# Rows of a run's log.
Log = Sequence[Mapping[str, float]]


def plot(path: Path, tables: Mapping[Table, Mapping[Row, Sequence[Mapping[str, Any]]]]) -> None:
    """Draw the runs that finished as points, their means as bars; diverged ones are written on their line."""
    heights = [max(len(table.rows), 2) for table in tables]
    size = (8, 0.34 * sum(heights) + 0.9 * len(heights))
    figure, axes = plt.subplots(
        len(tables), figsize=size, height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (table, results) in zip(axes[:, 0], tables.items(), strict=True):
        for place, row in enumerate(table.rows):
            runs = results.get(row, ())
            precisions = [result["map"] or 0.0 for result in runs if result["outcome"] == "finished"]
            axis.plot(precisions, [place] * len(precisions), "o", color=POINT, alpha=0.6, markersize=5)
            if precisions:
                axis.plot(
                    sum(precisions) / len(precisions),
                    place,
                    "|",
                    color=MEAN,
                    markersize=14,
                    markeredgewidth=2,
                )
            if len(precisions) < len(runs):
                axis.text(0.01, place, f"{len(runs) - len(precisions)} of {len(runs)} diverged", va="center")
        axis.set_yticks(range(len(table.rows)), [row.label for row in table.rows])
        axis.set_ylim(len(table.rows) - 0.5, -0.5)
        axis.set_title(table.title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlim(0, 1)
    axes[-1, 0].set_xlabel("mAP on test images, PASCAL VOC 2007 metric (points: seeds, bars: means)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(path: Path, tables: Mapping[Table, Mapping[Row, Sequence[Log]]]) -> None:
    """Draw how mAP grows by method: means over the seeds that have come so far."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(4.5 * len(tables), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (table, logs) in zip(axes[0], tables.items(), strict=True):
        for row in table.rows:
            curve = mean_curve(logs.get(row, ()))
            style = {"color": "black", "linewidth": 2.5} if row.is_baseline else {"linewidth": 1.2}
            axis.plot(list(curve), list(curve.values()), label=row.label, **style)
        axis.set_title(table.title, fontsize=10, loc="left")
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0, 0].set_ylabel("mAP on test images, mean over seeds")
    axes[0, 0].set_ylim(0, 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_curve(logs: Sequence[Log]) -> dict[int, float]:
    """mAP by iteration, the mean over the logs that have one there."""
    found: dict[int, list[float]] = {}
    for log in logs:
        for row in log:
            if "map" in row:
                found.setdefault(int(row["iteration"]), []).append(row["map"])
    return {iteration: sum(values) / len(values) for iteration, values in sorted(found.items())}
