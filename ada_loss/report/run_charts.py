"""Charts that set runs side by side over their steps: losses, metrics, skipped steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import altair as alt

from ada_loss.core.records import StepRecord
from ada_loss.report.charts import finished, rows, run_colours, run_dashes
from ada_loss.report.facts import RunFacts
from ada_loss.report.theme import RUN_COLOURS, var

MOST_POINTS = 400
"""Of one run's line; of more, every n-th is drawn."""

MOST_ORIGINS = 6
"""So many places at which overflows began have a colour of their own."""


def loss_chart(runs: Sequence[RunFacts]) -> Any:
    """The true loss of every run on its sampled steps."""
    return _line_chart(runs, "loss", lambda step: step.loss)


def metric_charts(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """A chart of every metric that any run has recorded, by its name."""
    names = dict.fromkeys(name for run in runs for step in run.run.steps for name in step.metrics)
    return {name: _line_chart(runs, name, lambda step, name=name: step.metrics.get(name)) for name in names}


def _line_chart(runs: Sequence[RunFacts], title: str, value: Callable[..., float | None]) -> Any:
    records: list[dict[str, Any]] = []
    values: list[float] = []
    for run in runs:
        points = [(step.step, found) for step in run.run.steps if (found := value(step)) is not None]
        for step, found in points[:: -(-len(points) // MOST_POINTS) or 1]:
            records.append({"run": run.name, "step": step, "value": found})
            values.append(abs(found))
    names = [run.name for run in runs]
    wild = min(values, default=1) > 0 and max(values, default=1) > 1000 * median(values or [1])
    scale = alt.Scale(type="log") if wild else alt.Scale(zero=False)
    pick = alt.selection_point(fields=["run"], bind="legend", name="pick")
    chart = (
        alt.Chart(rows(records, run="string", step="number", value="number"))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False)),
            y=alt.Y(
                "value:Q", title=title, scale=scale, axis=alt.Axis(grid=True, tickCount=5, format=".4~g")
            ),
            color=alt.Color("run:N", title=None, scale=run_colours(names), legend=_legend()),
            strokeDash=alt.StrokeDash("run:N", title=None, scale=run_dashes(names), legend=_legend()),
            opacity=alt.condition(pick, alt.value(1), alt.value(0.12)),
            tooltip=[
                alt.Tooltip("run:N", title="run"),
                alt.Tooltip("step:Q", title="step"),
                alt.Tooltip("value:Q", title=title, format=".4g"),
            ],
        )
        .add_params(pick)
    )
    return finished(chart, f"The {title} of {len(runs)} runs over their steps.", height=240)


def _legend() -> alt.Legend:
    return alt.Legend(columns=5, symbolType="stroke", symbolSize=300, symbolStrokeWidth=2)


def skip_chart(runs: Sequence[RunFacts]) -> Any:
    """Every skipped step on the time axis, one row a run, with the place where its overflow began."""
    began = Counter(_origin(step) for run in runs for step in run.skips)
    origins = [origin for origin, _ in began.most_common(MOST_ORIGINS)]
    if len(began) > len(origins):
        origins.append("elsewhere")
    records = [
        {"run": run.name, "step": step.step, "where": _origin(step), "origin": _known(_origin(step), origins)}
        | {"exponent": step.exponent}
        for run in runs
        for step in run.skips
    ]
    last = max((run.last_step for run in runs), default=0)
    data = rows(records, run="string", step="number", where="string", origin="string", exponent="number")
    chart = (
        alt.Chart(data)
        .mark_tick(thickness=2.5, opacity=1)
        .encode(
            x=alt.X("step:Q", title="step", scale=alt.Scale(domain=[0, last], nice=False)),
            y=alt.Y("run:N", title=None, sort=None, scale=alt.Scale(domain=[run.name for run in runs])),
            color=alt.Color(
                "origin:N",
                title="overflow began in",
                sort=origins,
                scale=alt.Scale(
                    domain=origins,
                    range=[
                        var("idle") if o == "elsewhere" else var(f"run{n % RUN_COLOURS}")
                        for n, o in enumerate(origins)
                    ],
                ),
                legend=alt.Legend(columns=3, labelLimit=280, symbolType="square"),
            ),
            tooltip=[
                alt.Tooltip("run:N", title="run"),
                alt.Tooltip("step:Q", title="skipped step"),
                alt.Tooltip("where:N", title="began in"),
                alt.Tooltip("exponent:Q", title="scale 2 to the power of"),
            ],
        )
    )
    return finished(chart, "The steps that were skipped in every run.", height=max(50, 30 * len(runs)))


def _origin(step: StepRecord) -> str:
    return "unknown" if step.began is None else str(step.began)


def _known(origin: str, origins: Sequence[str]) -> str:
    return origin if origin in origins else "elsewhere"
