"""Charts of layers: what they lost by method, and how their scales moved."""

from __future__ import annotations

import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from ada_loss.core.records import INPUT_GRADIENT, Place
from ada_loss.core.verdicts import percent
from ada_loss.report.charts import (
    FEW_LAYERS,
    banded,
    finished,
    found,
    layer_axis,
    layer_height,
    power_text,
    rows,
    searchable,
)
from ada_loss.report.facts import FIXED, RunFacts
from ada_loss.report.theme import var

MOST_CELLS = 24_000
"""Of a heat map, for a page that is small and quick."""

_LOST_LIMITS = (0.001, 0.01, 0.05, 0.2, 0.5, 0.9)
_LOST = ("up to 0.1 %", "to 1 %", "to 5 %", "to 20 %", "to 50 %", "to 90 %", "more", "not measured")
"""Classes of lost shares, and where they end."""


def underflow_chart(facts: RunFacts, runs: Sequence[RunFacts]) -> Any:
    """The share that every layer lost, by method; and what single scales would have lost."""
    layers = facts.layers
    number = {layer.path: row for row, layer in enumerate(layers)}
    cells: list[tuple[str, str, float | None]] = [
        (layer.path, name, layer.underflow(exponent))
        for layer in layers
        for name, exponent in (("no scaling *", 0), ("fixed 128 *", FIXED))
    ]
    for run in runs:
        # Layers of runs of another model have no row of their own.
        cells += [(layer.path, run.name, layer.lost) for layer in run.layers if layer.path in number]
    names = ["no scaling *", "fixed 128 *", *(run.name for run in runs)]
    data = rows(
        [
            {
                "row": number[path],
                "layer": path,
                "method": name,
                "lost": lost,
                "text": "not measured" if lost is None else percent(lost).replace("under ", "<"),
                "band": _LOST[-1 if lost is None else bisect(_LOST_LIMITS, lost)],
            }
            for path, name, lost in cells
        ],
        row="number",
        layer="string",
        method="string",
        lost="number",
        text="string",
        band="string",
    )
    base = found(alt.Chart(data), len(layers)).encode(
        x=alt.X(
            "method:N", sort=names, title=None, axis=alt.Axis(orient="top", labelAngle=0, labelLimit=110)
        ),
        y=layer_axis(len(layers)),
    )
    rectangles = base.mark_rect(
        stroke=var("panel"), strokeWidth=2 if len(layers) <= FEW_LAYERS else 0
    ).encode(
        color=banded(
            "band:N", "share lost", _LOST, [f"loss{band}" for band in range(len(_LOST) - 1)] + ["page"]
        ),
        tooltip=[
            alt.Tooltip("layer:N", title="layer"),
            alt.Tooltip("method:N", title="method"),
            alt.Tooltip("text:N", title="lost"),
        ],
    )
    parts = [rectangles]
    if len(layers) <= FEW_LAYERS:
        ink = alt.condition("datum.lost > 0.2", alt.value(var("onloss")), alt.value(var("ink")))
        parts.append(base.mark_text(fontSize=11).encode(text="text:N", color=ink))
    chart = searchable(alt.layer(*parts), len(layers))
    text = (
        "For each layer and method the largest share of a gradient that was lost. With an asterisk: what a "
        "single scale would lose of the true gradients."
    )
    return finished(chart, text, height=layer_height(len(layers)))


def shift_chart(facts: RunFacts) -> Any:
    """The scale that every layer's gradient carried, over time."""
    layers = facts.layers
    histories = _histories(facts)
    boundaries = _boundaries([exponent for runs in histories.values() for _, _, exponent in runs])
    names = _band_names(boundaries)
    budget = max(2, MOST_CELLS // max(1, len(layers)))
    records = [
        {"row": row, "layer": layer.path, "from": start, "to": stop, "exponent": exponent}
        | {"band": names[bisect(boundaries, exponent) - 1]}
        for row, layer in enumerate(layers)
        for start, stop, exponent in _coarser(histories.get(layer.path, []), budget)
    ]
    numbers = dict.fromkeys(("row", "from", "to", "exponent"), "number")
    data = rows(records, **numbers, layer="string", band="string")
    chart = (
        found(alt.Chart(data), len(layers))
        .mark_rect()
        .encode(
            x=alt.X("from:Q", title="step", axis=alt.Axis(grid=False), scale=alt.Scale(nice=False)),
            x2="to:Q",
            y=layer_axis(len(layers)),
            color=banded("band:N", "scale", names, [f"scale{number}" for number in _spread(len(names))]),
            tooltip=[
                alt.Tooltip("layer:N", title="layer"),
                alt.Tooltip("from:Q", title="from step"),
                alt.Tooltip("to:Q", title="up to step"),
                alt.Tooltip("exponent:Q", title="scale 2 to the power of"),
            ],
        )
    )
    text = f"The scale that each layer's gradient carried in the run {facts.name}, over its steps."
    return finished(searchable(chart, len(layers)), text, height=layer_height(len(layers)))


def _histories(facts: RunFacts) -> dict[str, list[tuple[int, int, int]]]:
    """By layer: from which step to which its input gradient, or another one, carried which exponent."""
    chosen: dict[str, Place] = {}
    for summary in facts.gradients:
        place = summary.place
        if place.kind == INPUT_GRADIENT or place.layer not in chosen:
            chosen[place.layer] = place
    wanted = set(chosen.values())
    ends = dict(zip(facts.sampled, [*facts.sampled[1:], facts.last_step + 1], strict=True))
    found: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for record in facts.run.places:
        if record.place in wanted:
            history = found[record.place.layer]
            stop = ends[record.step]
            if history and history[-1][1:] == (record.step, record.exponent):
                history[-1] = history[-1][0], stop, record.exponent
            else:
                history.append((record.step, stop, record.exponent))
    return found


def _coarser(history: list[tuple[int, int, int]], most: int) -> list[tuple[int, int, int]]:
    """A history of at most so many pieces: neighbours are put together, under the exponent of the longest."""
    size = math.ceil(len(history) / most)
    groups = [history[start : start + size] for start in range(0, len(history), size)] if history else []
    return [
        (group[0][0], group[-1][1], max(group, key=lambda piece: piece[1] - piece[0])[2]) for group in groups
    ]


def _boundaries(exponents: Iterable[int]) -> list[int]:
    """The exponents at which a colour begins, at most 9, evenly spread; and where the last ends."""
    present = sorted(set(exponents)) or [0]
    step = max(1, math.ceil((present[-1] - present[0] + 1) / 9))
    return list(range(present[0], present[-1] + step + 1, step))


def _band_names(boundaries: Sequence[int]) -> list[str]:
    """The scales that share a colour, in words."""
    return [
        power_text(low) if low == high - 1 else f"{power_text(low)} to {power_text(high - 1)}"
        for low, high in pairwise(boundaries)
    ]


def _spread(count: int) -> list[int]:
    """Numbers of `count` of the 9 colours of scales, as far apart as can be."""
    return [round(number * 8 / max(1, count - 1)) for number in range(count)]
