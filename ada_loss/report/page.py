"""The page: one HTML file that holds everything it needs, also without a network."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from altair.utils.schemapi import debug_mode
from markupsafe import Markup, escape

from ada_loss.core.verdicts import PlaceSummary, Word, power
from ada_loss.report.charts import VEGA_LITE, as_spec
from ada_loss.report.facts import RunFacts, best_of, best_single, line_sentence, lines
from ada_loss.report.gradient_charts import density_chart, histogram_chart
from ada_loss.report.layer_charts import shift_chart, underflow_chart
from ada_loss.report.run_charts import loss_chart, metric_charts, skip_chart
from ada_loss.report.theme import DARK, FONT, LIGHT, css
from ada_loss.report.window_chart import window_chart, window_text

MOST_ROWS = 150
"""Of the table of verdicts; the worst come first."""

_SEVERITY = [Word.OVERFLOW_FORWARD, Word.OVERFLOW_BACKWARD, Word.UNDERFLOW, Word.NEVER_TRAINED, Word.FINE]


@dataclass(frozen=True)
class Row:
    """One place in the table of verdicts."""

    path: str
    kind: str
    word: str
    verdict: str
    window: str
    largest: str
    zeros: str
    carried: str


def charts(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Every chart of a page by its name; those of a single run end in a dot and its number."""
    # Altair would check every value against Vega-Lite's schema, which takes longer than all the rest.
    with debug_mode(False):
        return _charts(runs)


def _charts(runs: Sequence[RunFacts]) -> dict[str, Any]:
    best = best_of(runs)
    drawn: dict[str, Any] = {}
    for number, run in enumerate(runs):
        if run.layers:
            drawn[f"windows.{number}"] = window_chart(run, lines(run, runs))
            drawn[f"shifts.{number}"] = shift_chart(run)
            drawn[f"histograms.{number}"] = histogram_chart(run)
            drawn[f"density.{number}"] = density_chart(run)
    if best.layers:
        drawn["underflow"] = underflow_chart(best, runs)
    if any(step.loss is not None for run in runs for step in run.run.steps):
        drawn["loss"] = loss_chart(runs)
    drawn |= {f"metric {name}": chart for name, chart in metric_charts(runs).items()}
    if any(run.skips for run in runs):
        drawn["skips"] = skip_chart(runs)
    return drawn


def titles(runs: Sequence[RunFacts], names: Iterable[str]) -> dict[str, str]:
    """What to write above the charts where there is no page around them."""
    said = {
        "windows": "Single scales that suit each layer",
        "shifts": "Scales over time",
        "histograms": "Gradients, before and after scaling",
        "density": "Gradients of all layers, before and after scaling",
        "underflow": "The share of gradients that each method loses",
        "loss": "Loss",
        "skips": "Skipped steps",
    }
    found = {}
    for name in names:
        chart, _, number = name.partition(".")
        of_run = f", {runs[int(number)].name}" if chart in said and number else ""
        found[name] = said.get(chart if of_run or not number else "", name.removeprefix("metric ")) + of_run
    return found


def make_page(runs: Sequence[RunFacts], drawn: Mapping[str, Any] | None = None) -> str:
    """The page of some runs, one or many, whole or broken; drawn: its `charts`, if they are there already."""
    drawn = charts(runs) if drawn is None else drawn
    specs = {name: as_spec(chart) for name, chart in drawn.items()}
    return _template().render(
        runs=runs,
        first=runs.index(best_of(runs)),
        sentences={run.name: [line_sentence(run, line) for line in lines(run, runs)] for run in runs},
        best={run.name: best_single(run) for run in runs},
        tables={run.name: verdict_rows(run) for run in runs},
        most_rows=MOST_ROWS,
        charts=drawn.keys(),
        metrics=[name.removeprefix("metric ") for name in drawn if name.startswith("metric ")],
        power=power,
        font=Markup(FONT),
        light=Markup(css(LIGHT)),
        dark=Markup(css(DARK)),
        style=Markup(_beside("page.css")),
        script=Markup(_beside("page.js")),
        library=Markup(_library()),
        specs=_packed(json.dumps(specs, separators=(",", ":"))),
    )


def verdict_rows(run: RunFacts) -> list[Row]:
    """The table of verdicts, the worst first."""
    return [_row(place) for place in sorted(run.places, key=_severity)]


def _severity(place: PlaceSummary) -> tuple[int, float]:
    verdict = place.verdict
    return _SEVERITY.index(verdict.word), 0 if verdict.word is Word.FINE else -verdict.number


def _row(place: PlaceSummary) -> Row:
    low, high = place.lowest_exponent, place.highest_exponent
    verdict = place.verdict
    return Row(
        place.place.path,
        place.place.kind,
        verdict.word.value,
        str(verdict),
        window_text(place.window) if place.place.direction == "backward" else "",
        f"{place.truth.largest:.2g}" if place.truth.nonzero else "0",
        f"{place.truth.zeros / place.truth.size:.1%}" if place.truth.size else "",
        power(low) if low == high else f"{power(low)} to {power(high)}",
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, which makes `vegaEmbed` known."""
    return str(vl_convert.javascript_bundle(vl_version=VEGA_LITE))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["powers"] = _raised
    return environment.from_string(_beside("page.html"))


def _raised(text: str) -> Markup:
    """A text with its powers of two as in print."""
    return Markup(
        re.sub(r"2\^(-?\d+)", r"2<sup>\1</sup>", str(escape(text))).replace("<sup>-", "<sup>\u2212")
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    """A text in a tenth of its size, for the page's script: with ten runs of 500 layers it matters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
