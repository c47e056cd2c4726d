"""Charts of how a run's gradients are spread, before and after scaling, over what their format can hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import altair as alt

from ada_loss.core.formats import FloatFormat
from ada_loss.core.histogram import Histogram, merge
from ada_loss.core.records import Place
from ada_loss.core.verdicts import PlaceSummary
from ada_loss.report.charts import finished, found, layer_axis, layer_height, power_labels, rows, searchable
from ada_loss.report.facts import RunFacts
from ada_loss.report.theme import var

MOST_PANELS = 12
"""How many gradients are drawn one by one."""

WIDTH_OF_BOTH = 860
"""In pixels, of the two heat maps before and after scaling."""

MAIN_SHARE = 5e-3
"""Bins with a smaller share do not make an axis longer."""

LEAST_SHARE = 1e-4
"""Smaller shares of a gradient are not drawn."""


def density_chart(facts: RunFacts) -> Any:
    """How the magnitudes of every layer's gradients are spread, before and after scaling, as a heat map."""
    layers = facts.layers
    width = 1 if len(layers) <= 100 else 2
    spread = {
        layer.path: _before_and_after(facts, [place.place for place in layer.places]) for layer in layers
    }
    records = []
    for row, layer in enumerate(layers):
        for state, histogram in zip(("before", "after"), spread[layer.path], strict=True):
            for low, share in _shares(histogram, width):
                if share >= LEAST_SHARE:
                    cell = {"row": row, "layer": layer.path, "state": state, "low": low, "high": low + width}
                    records.append(cell | {"share": share})
    data = rows(
        records, row="number", layer="string", state="string", low="number", high="number", share="number"
    )
    lowest, highest = _reach(records, facts.number_format)

    def panel(state: str, title: str, *, named: bool) -> Any:
        y = layer_axis(len(layers))
        if not named:
            y = y.axis(None)
        cells = (
            found(alt.Chart(data), len(layers))
            .transform_filter(alt.datum.state == state)
            .mark_rect(color=var("good"), clip=True)
            .encode(
                x=_magnitude_axis("low:Q", lowest, highest),
                x2="high:Q",
                y=y,
                opacity=alt.Opacity("share:Q", scale=alt.Scale(type="sqrt", range=[0.06, 1]), legend=None),
                tooltip=[
                    alt.Tooltip("layer:N", title="layer"),
                    alt.Tooltip("low:Q", title="from 2 to the power of"),
                    alt.Tooltip("share:Q", title="share of its gradients", format=".2%"),
                ],
            )
        )
        width = (WIDTH_OF_BOTH - 40) // 2
        return alt.layer(*_format_range(facts.number_format, lowest, highest), cells).properties(
            width=width, height=layer_height(len(layers)), title=alt.Title(title, fontSize=13, offset=6)
        )

    chart = alt.hconcat(
        panel("before", "true gradients", named=True),
        panel("after", "as this run carried them", named=False),
        bounds="flush",
        spacing=36,
    ).resolve_scale(y="shared")
    text = (
        f"The spread of each layer's gradients in the run {facts.name}, before scaling and as they were "
        f"carried; the range of {facts.number_format.name} is shaded."
    )
    return finished(searchable(chart, len(layers)), text, fill=False)


def histogram_chart(facts: RunFacts) -> Any:
    """Histograms of the gradients that suffer most, before and after scaling."""
    chosen = _most_interesting(facts.gradients)
    records = []
    for row, summary in enumerate(chosen):
        for state, histogram in zip(
            ("before scaling", "after scaling"), _before_and_after(facts, [summary.place]), strict=True
        ):
            name = f"{summary.place.path} · {summary.place.kind}"
            records += [
                {"row": row, "place": name, "state": state, "low": low, "high": low + 1, "share": share}
                for low, share in _shares(histogram, 1)
                if share >= LEAST_SHARE
            ]
    types = dict(row="number", place="string", state="string", low="number", high="number", share="number")
    lowest, highest = _reach(records, facts.number_format)
    data = rows(records, **types)
    bars = (
        alt.Chart(data)
        .mark_rect(opacity=0.62, clip=True)
        .encode(
            x=_magnitude_axis("low:Q", lowest, highest),
            x2="high:Q",
            y=alt.Y("share:Q", title=None, axis=alt.Axis(format="%", tickCount=2, grid=True), stack=None),
            y2=alt.datum(0),
            color=alt.Color(
                "state:N",
                title=None,
                scale=alt.Scale(domain=["before scaling", "after scaling"], range=[var("bad"), var("good")]),
                legend=alt.Legend(symbolType="square"),
            ),
            tooltip=[
                alt.Tooltip("place:N", title="place"),
                alt.Tooltip("state:N", title="state"),
                alt.Tooltip("low:Q", title="from 2 to the power of"),
                alt.Tooltip("share:Q", title="share", format=".2%"),
            ],
        )
    )
    shades = _format_range(facts.number_format, lowest, highest, data=data)
    chart = (
        alt.layer(*shades, bars)
        .properties(width=318, height=96)
        .facet(
            facet=alt.Facet(
                "place:N",
                title=None,
                sort=alt.SortField("row"),
                header=alt.Header(labelAnchor="start", labelPadding=4),
            ),
            columns=3,
            spacing=18,
        )
        .resolve_scale(y="independent")
    )
    text = (
        f"Histograms of the magnitudes of {len(chosen)} gradients of the run {facts.name}, before and after "
        f"scaling; the range of {facts.number_format.name} is shaded."
    )
    return finished(chart, text, fill=False)


def _most_interesting(places: Sequence[PlaceSummary]) -> list[PlaceSummary]:
    """All gradients if they are few; of many those that need the most, and those that bear least."""
    trained = [place for place in places if place.truth.nonzero]
    if len(trained) <= MOST_PANELS:
        return trained
    needy = sorted(trained, key=lambda place: -place.window.lowest)[: MOST_PANELS // 2]
    rest = [place for place in trained if place not in needy]
    return needy + sorted(rest, key=lambda place: place.window.highest)[: MOST_PANELS - len(needy)]


def _before_and_after(facts: RunFacts, places: Sequence[Place]) -> tuple[Histogram, Histogram]:
    """The true values, and those of the run at the scales that they were carried with."""
    records = [record for place in places for record in facts.by_place[place] if record.finite]
    return (
        merge([record.reference or record.histogram for record in records]),
        merge([record.histogram.scaled(record.exponent) for record in records]),
    )


def _shares(histogram: Histogram, width: int) -> list[tuple[int, float]]:
    """The share of the non-zero elements in bins of so many powers of two, each with its lowest exponent."""
    bins: dict[int, int] = defaultdict(int)
    for exponent, count in enumerate(histogram.counts, histogram.lowest):
        bins[exponent // width * width] += count
    return [(low, count / histogram.nonzero) for low, count in bins.items()]


def _reach(records: Sequence[dict[str, Any]], number_format: FloatFormat) -> tuple[int, int]:
    """The exponents that an axis of magnitudes covers: all that are there, but stragglers."""
    lows = [record["low"] for record in records if record["share"] >= MAIN_SHARE]
    smallest = math.frexp(number_format.smallest_subnormal)[1] - 1
    largest = math.frexp(number_format.max)[1]
    return min([smallest, *lows]) - 4, max([largest + 2, *(low + 1 for low in lows)])


def _magnitude_axis(field: str, lowest: int, highest: int) -> alt.X:
    return alt.X(
        field,
        title="magnitude",
        scale=alt.Scale(domain=[lowest, highest], nice=False),
        axis=alt.Axis(labelExpr=power_labels(), grid=False, tickMinStep=1, tickCount=5, labelFlush=False),
    )


def _format_range(
    number_format: FloatFormat, lowest: int, highest: int, data: alt.InlineData | None = None
) -> list[Any]:
    """The range of normal numbers shaded, that of subnormal ones half as much."""
    smallest = math.frexp(number_format.smallest_subnormal)[1] - 1
    normal = math.frexp(number_format.smallest_normal)[1] - 1
    largest = math.frexp(number_format.max)[1]
    return [
        alt.Chart(rows([{"low": 0}], low="number") if data is None else data)
        .transform_aggregate(n="count()", groupby=["place"] if data is not None else [])
        .mark_rect(color=var("range"), opacity=opacity)
        .encode(x=alt.datum(start), x2=alt.datum(stop), y=alt.value(0), y2=alt.value("height"))
        for start, stop, opacity in ((smallest, normal, 0.12), (normal, largest, 0.26))
    ]
