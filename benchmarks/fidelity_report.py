"""What `fidelity.py` found, as a table, a plot and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ORACLE = "best fixed"
METHODS = {
    "none": "no scale",
    "dynamic": "Chainer's dynamic scaling, settled",
    "paper": "`approx_range` with its defaults",
    "auto": "`auto`",
    ORACLE: "the best single scale for the whole network, which nobody knows before",
}
"""The methods that are compared, and what they are."""


_PAGE = """# Fidelity of float16 gradients

Written by `python benchmarks/fidelity.py`; settings: {settings}.

Each network's loss is multiplied by 2^m. Gradients are compared with float32 ones for the same weights and
inputs, which float16 holds exactly. The figures are those of the worst parameter; parameters whose gradient
is zero in exact arithmetic are left out. The methods:

{methods}

Shortfall: how many dB a method's signal-to-noise ratio is below that of the best fixed scale, found by trying
them all for that very m; the largest over all m (negative: always ahead; lost: overflow). Underflow: the
largest share of zeros among the elements that some scale of their tensor could have kept. Overflow:
parameters, over all m, with an element that is not finite. parameters: how many are compared.

{table}

{finding}

![signal-to-noise ratio of the worst parameter over m](fidelity.png)
"""


@dataclass(frozen=True)
class Cell:
    """A network at a stage, its loss times 2**m, under a method.

    snr: of the worst parameter, in dB, -inf if it overflowed. underflow: the largest share of lost elements
    of a parameter. overflowed: parameters with an element that is not finite. log2_scale: of methods with a
    single scale.
    """

    model: str
    stage: str
    m: int
    method: str
    snr: float
    worst_parameter: str
    underflow: float
    underflow_parameter: str
    overflowed: int
    parameters: int
    log2_scale: int | None = None


def write(folder: Path, cells: list[Cell], settings: dict[str, Any]) -> None:
    """fidelity.json, README.md and fidelity.png in a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.json").write_text(_json(cells, settings) + "\n")
    (folder / "README.md").write_text(document(cells, settings))
    _plot(cells, folder / "fidelity.png")


def document(cells: list[Cell], settings: dict[str, Any]) -> str:
    """The page that shows the results."""
    return _PAGE.format(
        settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        methods="\n".join(f"- {method}: {meaning}" for method, meaning in METHODS.items()),
        table="\n".join(_table(cells)),
        finding=finding(cells),
    )


def shortfalls(cells: Iterable[Cell]) -> dict[tuple[str, str, int, str], float]:
    """dB below the best fixed scale, by (model, stage, m, method); inf where a method overflowed."""
    cells = list(cells)
    best = {(c.model, c.stage, c.m): c.snr for c in cells if c.method == ORACLE}
    return {
        (c.model, c.stage, c.m, c.method): math.inf if c.overflowed else best[c.model, c.stage, c.m] - c.snr
        for c in cells
    }


def finding(cells: list[Cell], method: str = "auto") -> str:
    """What the figures say of a method, over all networks and m."""
    short = shortfalls(cells)
    mine = [c for c in cells if c.method == method]
    if not mine:
        return ""
    worst = max(mine, key=lambda c: short[c.model, c.stage, c.m, method])
    best = min(mine, key=lambda c: short[c.model, c.stage, c.m, method])
    lost = max(mine, key=lambda c: c.underflow)
    behind, ahead = (short[c.model, c.stage, c.m, method] for c in (worst, best))
    return (
        f"Of {len(mine)} cells `{method}` is furthest below the best fixed scale in {_place(worst)}, by "
        f"{_db(behind)}, and furthest ahead of it in {_place(best)}, by {_db(-ahead)}. "
        f"{sum(c.overflowed for c in mine)} gradients overflow; the largest share of a parameter's elements "
        f"that underflow is {lost.underflow:.3%}, in {_place(lost)} ({lost.underflow_parameter})."
    )


def _place(cell: Cell) -> str:
    return f"{cell.model} {cell.stage} at m = {cell.m}"


def _table(cells: list[Cell]) -> list[str]:
    compared = [method for method in METHODS if method != ORACLE and any(c.method == method for c in cells)]
    short = shortfalls(cells)
    lines = [
        "| network | parameters | best fixed, dB | "
        + " | ".join(f"{m}: shortfall, underflow, overflow" for m in compared)
        + " |",
        "| --- " * (len(compared) + 3) + "|",
    ]
    for subject in dict.fromkeys((c.model, c.stage) for c in cells):
        mine = [c for c in cells if (c.model, c.stage) == subject]
        oracle = [c.snr for c in mine if c.method == ORACLE]
        row = [" ".join(subject), str(mine[0].parameters), _range(oracle)]
        for method in compared:
            of_method = [c for c in mine if c.method == method]
            worst = max(short[(*subject, c.m, method)] for c in of_method)
            underflow = max(c.underflow for c in of_method)
            row.append(f"{_db(worst)}, {underflow:.2%}, {sum(c.overflowed for c in of_method)}")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"


def _db(value: float) -> str:
    return "lost" if value == math.inf else f"{value:.2f} dB"


def _json(cells: list[Cell], settings: dict[str, Any]) -> str:
    rows = [{key: _number(value) for key, value in asdict(cell).items()} for cell in cells]
    return json.dumps({"settings": settings, "cells": rows}, indent=1)


def _number(value: Any) -> Any:
    """JSON has no infinities: overflow is null."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _plot(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    subjects = list(dict.fromkeys((c.model, c.stage) for c in cells))
    columns = min(4, len(subjects))
    rows = -(-len(subjects) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(subjects) :]:
        axis.axis("off")
    for axis, subject in zip(axes.flat, subjects, strict=False):
        for method in METHODS:
            mine = [
                c for c in cells if (c.model, c.stage) == subject and c.method == method and not c.overflowed
            ]
            style = {"color": "black", "linestyle": ":", "zorder": 3} if method == ORACLE else {}
            axis.plot([c.m for c in mine], [max(c.snr, -5) for c in mine], marker=".", label=method, **style)
        axis.set_title(" ".join(subject), fontsize=9)
        axis.set_xlabel("m (loss times 2^m)", fontsize=8)
        axis.set_ylabel("dB, worst parameter", fontsize=8)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=len(METHODS), fontsize=8
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
