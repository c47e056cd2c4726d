"""The text of results/README.md, from runs that have ended."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import Row, Table

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """The runs of a row, one per seed.

    Attributes:
        precisions: mAP of the runs that finished.
        n_diverged: how many of them diverged.
        skipped: skipped steps, mean over the runs.
        seconds: training time, mean over the runs.
    """

    precisions: tuple[float, ...]
    n_diverged: int
    skipped: float
    seconds: float

    @property
    def n_runs(self) -> int:
        return len(self.precisions) + self.n_diverged

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.precisions) if self.precisions else None

    @property
    def spread(self) -> float:
        """Sample standard deviation; 0 for a single run."""
        return statistics.stdev(self.precisions) if len(self.precisions) > 1 else 0.0


def summarize(results: Sequence[Result]) -> Summary:
    """Several seeds of one row; a list that is not empty."""
    finished = [result for result in results if result["outcome"] == "finished"]
    return Summary(
        # A detector that finds nothing of any class has no precision at all.
        tuple(result["map"] or 0.0 for result in finished),
        len(results) - len(finished),
        statistics.mean(result["skipped_steps"] for result in results),
        statistics.mean(result["seconds"] for result in results),
    )


def precision_text(summary: Summary) -> str:
    """Mean and spread in one cell, and how many runs diverged."""
    if summary.mean is None:
        return "diverged"
    text = f"{summary.mean:.4f}" + (f" ± {summary.spread:.4f}" if len(summary.precisions) > 1 else "")
    return f"{text} ({summary.n_diverged} of {summary.n_runs} diverged)" if summary.n_diverged else text


def table_text(table: Table, results: Mapping[Row, Sequence[Result]]) -> str:
    """A Markdown table; rows without a finished run are left out."""
    with_published = any(row.published for row in table.rows)
    head = ["loss scaling", "mAP here", "seeds", "skipped steps", "seconds"]
    lines = [head + ["published, SSD512 on VOC"] * with_published]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in table.rows:
        if results.get(row):
            summary = summarize(results[row])
            cells = [row.label, precision_text(summary), str(summary.n_runs)]
            cells += [f"{summary.skipped:.1f}", f"{summary.seconds:.0f}"]
            lines.append(cells + [row.published or ""] * with_published)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def finding(table: Table, results: Mapping[Row, Sequence[Result]]) -> str:
    """What the figures of a table say, in one sentence; nothing without several rows and seeds."""
    summaries = {row: summarize(results[row]) for row in table.rows if results.get(row)}
    means = {row.label: summary.mean for row, summary in summaries.items() if summary.mean is not None}
    if len(means) < 2 or min(summary.n_runs for summary in summaries.values()) < 2:
        return ""
    worst, best = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    noise = max(summary.spread for summary in summaries.values())
    gap = means[best] - means[worst]
    verdict = "far more" if gap > 4 * noise else "more" if gap > 2 * noise else "no more"
    return (
        f"From {worst} ({means[worst]:.3f}) to {best} ({means[best]:.3f}) it is {gap:.3f}: {verdict} than "
        f"seeds alone would make, with standard deviations of up to {noise:.3f}."
    )


def readme_text(scale: str, results: Mapping[Table, Mapping[Row, Sequence[Result]]]) -> str:
    """All of README.md: how the runs were made, a table with its finding for each comparison, the plot."""
    runs = [result for rows in results.values() for sequence in rows.values() for result in sequence]
    sections = [INTRODUCTION.format(scale=scale, n_runs=len(runs), kernels=_used(runs, "kernels"))]
    for table, rows in results.items():
        iterations = max(result["iterations"] for sequence in rows.values() for result in sequence)
        sections += [f"## {table.title}, {iterations} iterations", table_text(table, rows)]
        sections += [finding(table, rows)]
    sections += [f"![mAP of every run]({scale}.png)"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _used(runs: Sequence[Result], name: str) -> str:
    return ", ".join(sorted({str(result[name]) for result in runs}))


INTRODUCTION = """# Results

Written by `make results` (`python results/make_results.py --help`), from {n_runs} runs at the scale
`{scale}`; the logs that the figures come from lie in [`{scale}/`]({scale}). mAP is that of PASCAL VOC 2007
on test images, after the last iteration; mean ± standard deviation over seeds. Kernels: {kernels}. Seconds
are of runs that may have shared the machine with others; they are no benchmark.

The published figures are of SSD512 on PASCAL VOC, trained for 120,000 iterations on GPUs. What is trained
here at the scale `digits` is a small SSD on 1000 images of handwritten digits: far fewer and shallower
layers, whose gradients are large enough for float16 as they are. Compare row with row, not column with
column.

In the tables of a multiplied loss the gradients of all layers are smaller by that factor on their way
through the network, and are multiplied back in float32 for the update. In float32 that changes nothing; in
float16 it shows what underflow costs. It is an experiment, no way to train."""
