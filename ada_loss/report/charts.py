"""What the charts share: their data in little room, their rows of layers, and a search for layers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from ada_loss.report.theme import RUN_COLOURS, config, var

FEW_LAYERS = 40
"""So many rows have room for their names; more are found by a search."""

WIDTH = 960
"""In pixels, of charts that do not fill the page by themselves, and of pictures."""

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
"""The version of Vega-Lite that charts are written in, as vl-convert wants it."""

_SUPERSCRIPTS = dict(zip("0123456789-\u2212", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻", strict=True))

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])


def power_text(exponent: float) -> str:
    """A scale as a power of two, written as in print."""
    return "2" + "".join(_SUPERSCRIPTS[digit] for digit in f"{exponent:.0f}")


def power_labels() -> str:
    """The same as an expression for an axis."""
    label = "format(datum.value, 'd')"
    for digit, raised in _SUPERSCRIPTS.items():
        label = f"replace({label}, /{digit}/g, '{raised}')"
    return f"'2' + {label}"


def rows(records: Sequence[Mapping[str, Any]], **types: str) -> alt.InlineData:
    """Data for a chart as text with commas, a third of the size of JSON; empty cells are null.

    types: `number` or `string` by column, in their order.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(types)
    for record in records:
        writer.writerow([_cell(record[name]) for name in types])
    return alt.InlineData(values=text.getvalue(), format=alt.CsvDataFormat(type="csv", parse=types))


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def layer_axis(count: int) -> alt.Y:
    """One row a layer, in the order of the data's column `row`."""
    return alt.Y(
        "layer:N",
        sort=alt.SortField("row"),
        title=None,
        axis=alt.Axis(labelOverlap=count > FEW_LAYERS, labelLimit=220),
    )


def layer_height(count: int) -> int:
    """Of a chart with so many rows, in pixels: with many a row is thin, so that all are in view."""
    return max(60, min(26 * count, 520)) if count <= FEW_LAYERS else 680


def searchable(chart: Any, count: int) -> Any:
    """With many layers: a field that leaves those whose path holds a text."""
    if count <= FEW_LAYERS:
        return chart
    find = alt.param(
        name="find",
        value="",
        bind=alt.BindInput(input="search", placeholder="part of a path", name="Find layers "),
    )
    return chart.add_params(find)


def found(chart: Any, count: int) -> Any:
    """The part of `searchable` that every layer of a chart needs."""
    if count <= FEW_LAYERS:
        return chart
    return chart.transform_filter("!find || indexof(lower(datum.layer), lower(find)) >= 0")


def banded(field: str, title: str, names: Sequence[str], colours: Sequence[str]) -> alt.Color:
    """Colours of classes that have an order, with all of them in the legend."""
    return alt.Color(
        field,
        title=title,
        sort=list(names),
        scale=alt.Scale(domain=list(names), range=[var(colour) for colour in colours]),
        legend=alt.Legend(symbolType="square", orient="bottom", columns=9, labelLimit=0),
    )


def run_colours(names: Sequence[str]) -> alt.Scale:
    """A colour for every run."""
    return alt.Scale(
        domain=list(names), range=[var(f"run{number % RUN_COLOURS}") for number in range(len(names))]
    )


def run_dashes(names: Sequence[str]) -> alt.Scale:
    """A dash for every run, so that no two look alike even without colours."""
    return alt.Scale(domain=list(names), range=[DASHES[number % len(DASHES)] for number in range(len(names))])


def finished(chart: Any, description: str, *, height: int | None = None, fill: bool = True) -> Any:
    """A chart with the house's look, filling the width of the page; the description is for those who do not
    see it."""
    options: dict[str, Any] = {"description": description}
    if fill:
        options["width"] = "container"
    if height is not None:
        options["height"] = height
    return chart.properties(**options).configure(**config())


def as_spec(chart: Any) -> dict[str, Any]:
    """A chart as Vega-Lite's JSON."""
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec
