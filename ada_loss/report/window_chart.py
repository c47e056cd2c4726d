"""The windows picture: for each layer the single scales that suit it, across all of them the usual ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import altair as alt

from ada_loss.core.verdicts import percent, power
from ada_loss.core.windows import Window
from ada_loss.report.charts import (
    FEW_LAYERS,
    finished,
    found,
    layer_axis,
    layer_height,
    power_labels,
    power_text,
    rows,
    searchable,
)
from ada_loss.report.facts import Layer, Line, RunFacts, best_single
from ada_loss.report.theme import var

_LINE_COLOURS = {"none": "soft", "fixed": "ink", "dynamic": "ink", "predicted": "ink"}
_LINE_DASHES = {"none": [2, 3], "fixed": [1, 0], "dynamic": [7, 3], "predicted": [7, 3, 2, 3]}

_NOT = "does not"

MOST_EXTENT = 96
"""How many powers of two around the middle of all windows are drawn."""

_HALF = 0.42
"""How far a bar reaches beyond the exponents at its ends, so that a single one is seen as well."""


def window_chart(facts: RunFacts, lines: Sequence[Line]) -> Any:
    """One bar a layer from the lowest scale without underflow to the highest without overflow."""
    layers = facts.layers
    best, _ = best_single(facts)
    low, high = _extent(layers, lines)
    data = _bars(layers, best, low, high)
    x = alt.X(
        "low:Q",
        title="scale of the loss",
        scale=alt.Scale(domain=[low, high], nice=False),
        axis=alt.Axis(labelExpr=power_labels(), tickMinStep=1),
    )
    base = found(alt.Chart(data), len(layers))
    tooltip = [
        alt.Tooltip("layer:N", title="layer"),
        alt.Tooltip("text:N", title="scales that suit"),
        alt.Tooltip("needs:N", title="needs the largest"),
        alt.Tooltip("bears:N", title="overflows first"),
        alt.Tooltip("plain:N", title="lost without a scale"),
        alt.Tooltip("fixed:N", title="lost at fixed 128"),
    ]
    y = layer_axis(len(layers))
    bars = (
        base.transform_filter("datum.state != 'no scale at all'")
        .mark_bar(cornerRadius=3 if len(layers) <= FEW_LAYERS else 0)
        .encode(
            x=x,
            x2="high:Q",
            y=y,
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(
                    domain=[_suits(best), _NOT, "no gradient"],
                    range=[var("good"), var("bad"), var("grid")],
                ),
                legend=alt.Legend(symbolType="square", orient="bottom", labelLimit=0),
            ),
            tooltip=tooltip,
        )
    )
    # Underflow ends above where overflow begins: the gap in which it has both.
    torn = (
        base.transform_filter("datum.state == 'no scale at all'")
        .mark_rule(strokeWidth=2, strokeDash=[2, 2], color=var("bad"))
        .encode(x=x, x2="high:Q", y=y, tooltip=tooltip)
    )
    parts = [
        *_common(facts.window, low, high),
        bars,
        torn,
        *_lines(lines, high - low),
        *_limits(base, y, facts),
    ]
    chart = searchable(alt.layer(*parts), len(layers))
    return finished(chart, description(facts, lines), height=layer_height(len(layers)))


def description(facts: RunFacts, lines: Sequence[Line]) -> str:
    """The picture in words."""
    scales = ", ".join(f"{line.name} at {power(line.exponent)}" for line in lines)
    return (
        f"One bar for each of {len(facts.layers)} layers, from the lowest scale without underflow to the "
        f"highest without overflow. Vertical lines: {scales}. {facts.sentence}"
    )


def window_text(window: Window) -> str:
    """A window in words."""
    if window == Window():
        return "any: no gradient"
    if window.empty:
        return f"none: needs {power(window.lowest)}, overflows above {power(window.highest)}"
    return f"{power(window.lowest)} to {power(window.highest)}"


def _extent(layers: Sequence[Layer], lines: Sequence[Line]) -> tuple[int, int]:
    """The exponents that the axis covers; what is very far away ends at its border."""
    ends = [
        end for layer in layers for end in (layer.window.lowest, layer.window.highest) if math.isfinite(end)
    ]
    middle = median(ends) if ends else 0
    near = [end for end in ends if abs(end - middle) <= MOST_EXTENT / 2]
    near += [line.exponent for line in lines]
    return int(min(near)) - 2, int(max(near)) + 2


def _bars(layers: Sequence[Layer], best: int, low: int, high: int) -> alt.InlineData:
    records = [
        {
            "row": number,
            "layer": layer.path,
            "low": min(high, max(low, layer.window.lowest - _HALF)),
            "high": max(low, min(high, layer.window.highest + _HALF)),
            "state": _state(layer, best),
            "text": window_text(layer.window),
            "needs": layer.needs.place.path,
            "bears": layer.bears.place.path,
            "plain": percent(layer.underflow(0)),
            "fixed": percent(layer.underflow(7)),
        }
        for number, layer in enumerate(layers)
    ]
    return rows(
        records,
        row="number",
        layer="string",
        low="number",
        high="number",
        state="string",
        text="string",
        needs="string",
        bears="string",
        plain="string",
        fixed="string",
    )


def _state(layer: Layer, best: int) -> str:
    if not layer.trained:
        return "no gradient"
    if layer.window.empty:
        return "no scale at all"
    return _suits(best) if best in layer.window else _NOT


def _suits(best: int) -> str:
    return f"suits the best single scale, {power_text(best)}"


def _common(window: Window, low: int, high: int) -> list[Any]:
    """A band behind the scales that suit every layer."""
    if window.empty or window == Window():
        return []
    band = {"low": max(low, window.lowest - 0.5), "high": min(high, window.highest + 0.5)}
    return [
        alt.Chart(rows([band], low="number", high="number"))
        .mark_rect(color=var("safe"), opacity=0.16)
        .encode(x="low:Q", x2="high:Q", y=alt.value(0), y2=alt.value("height"))
    ]


def _lines(lines: Sequence[Line], extent: int) -> list[Any]:
    """Vertical lines, each under its name; names that would meet stand one above the other."""
    drawn = []
    near: list[int] = []
    # So many powers of two are as wide as a name is long.
    long = 0.16 * extent
    for line in sorted(lines, key=lambda line: line.exponent):
        near = [exponent for exponent in near if line.exponent - exponent < long] + [line.exponent]
        above = -10 - 15 * (len(near) - 1)
        data = rows([{"low": line.exponent}], low="number")
        colour, dash = var(_LINE_COLOURS[line.kind]), _LINE_DASHES[line.kind]
        base = alt.Chart(data).encode(x="low:Q")
        drawn += [
            base.mark_rule(strokeWidth=1.5, strokeDash=dash, color=colour).encode(
                y=alt.value(above + 6), y2=alt.value("height")
            ),
            base.mark_text(
                text=f"{line.name}, {power_text(line.exponent)}", baseline="bottom", fontSize=12, color=colour
            ).encode(y=alt.value(above + 4)),
        ]
    return drawn


def _limits(base: Any, y: alt.Y, facts: RunFacts) -> list[Any]:
    """Where no single scale fits: what the two layers say that forbid it."""
    trained = [layer for layer in facts.layers if layer.trained]
    if not facts.window.empty or not trained:
        return []
    needs = max(trained, key=lambda layer: layer.window.lowest)
    bears = min(trained, key=lambda layer: layer.window.highest)
    texts = [
        (needs, "low", f"needs {power_text(needs.window.lowest)}", "right", -7),
        (bears, "high", f"overflows above {power_text(bears.window.highest)}", "left", 7),
    ]
    return [
        base.transform_filter(alt.datum.layer == layer.path)
        .mark_text(text=text, align=align, dx=dx, fontSize=12, **look)
        .encode(x=f"{end}:Q", y=y)
        for layer, end, text, align, dx in texts
        if not layer.window.empty
        # A halo keeps the text apart from what it crosses.
        for look in ({"stroke": var("panel"), "strokeWidth": 4}, {"color": var("ink")})
    ]
