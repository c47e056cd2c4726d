"""Pictures of how a run goes: losses and mAP over the iterations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

# A file for each, with the columns of the log that it shows and what they are called there.
PICTURES = {
    "loss.png": {"main/loss": "loss", "main/loss/loc": "offsets", "main/loss/conf": "classes"},
    "map.png": {"map": "mAP"},
}


def draw_pictures(rows: Rows, folder: Path) -> None:
    """Draw a log; a picture of that name is replaced when the new one is complete."""
    for name, columns in PICTURES.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel=next(iter(columns.values())))
        for column, label in columns.items():
            points = [(row["iteration"], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), ".-", label=label)
        axes.grid(alpha=0.3)
        axes.legend()
        partial = folder / f".{name}.partial"
        figure.savefig(partial, format="png")
        os.replace(partial, folder / name)
