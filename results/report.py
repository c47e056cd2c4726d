"""The text of results/README.md, from runs that have ended."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import Row, Table
from scipy.stats import ttest_1samp

Result = Mapping[str, Any]
# Of the tests whether a method differs from the baseline.
LEVEL = 0.05
# Of differences of an mAP.
ROUNDING = 1e-9


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


@dataclass(frozen=True)
class Difference:
    """How a row's mAP differs from the baseline's, seed by seed.

    Attributes:
        mean: over the seeds.
        p: how probable a mean at least as far from 0 is where there is no difference (paired t-test); None
            where no test is possible.
    """

    mean: float
    p: float | None


def difference(results: Sequence[Result], baseline: Sequence[Result]) -> Difference | None:
    """None without seeds that finished in both. A run that diverged counts as an mAP of 0."""
    ours, theirs = ({result["seed"]: _precision(result) for result in runs} for runs in (results, baseline))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gaps = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.mean(gaps)
    if len(gaps) < 2 or max(gaps) - min(gaps) < ROUNDING:
        # The same for every seed: no difference, or one without any spread to measure it by.
        return Difference(mean, 1.0 if abs(mean) < ROUNDING and len(gaps) > 1 else None)
    return Difference(mean, float(ttest_1samp(gaps, 0).pvalue))


def significant(differences: Mapping[Row, Difference]) -> set[Row]:
    """The rows that differ from the baseline, one error in twenty tables allowed (Holm's correction)."""
    tested = sorted(
        (row for row, d in differences.items() if d.p is not None), key=lambda row: differences[row].p
    )
    kept = set()
    for place, row in enumerate(tested):
        if differences[row].p * (len(tested) - place) > LEVEL:
            break
        kept.add(row)
    return kept


def differences_of(
    table: Table, results: Mapping[Row, Sequence[Result]], baseline: Sequence[Result]
) -> dict[Row, Difference]:
    """Of every row but the baseline itself."""
    found = {
        row: difference(results[row], baseline)
        for row in table.rows
        if results.get(row) and not row.is_baseline
    }
    return {row: gap for row, gap in found.items() if gap is not None}


def _precision(result: Result) -> float:
    return (result["map"] or 0.0) if result["outcome"] == "finished" else 0.0


def table_text(table: Table, results: Mapping[Row, Sequence[Result]], baseline: Sequence[Result] = ()) -> str:
    """A Markdown table; rows without a run that has ended are left out."""
    with_published = any(row.published for row in table.rows)
    gaps = differences_of(table, results, baseline)
    head = ["loss scaling", "mAP here", "to FP32, by seed", "seeds", "skipped steps", "seconds"]
    lines = [head + ["published, SSD512 on VOC"] * with_published]
    lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
    for row in table.rows:
        if results.get(row):
            summary = summarize(results[row])
            cells = [row.label, precision_text(summary), difference_text(gaps.get(row)), str(summary.n_runs)]
            cells += [f"{summary.skipped:.1f}", f"{summary.seconds:.0f}"]
            lines.append(cells + [row.published or ""] * with_published)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def difference_text(gap: Difference | None) -> str:
    if gap is None:
        return ""
    return f"{gap.mean:+.4f}" + ("" if gap.p is None else f" (p = {gap.p:.2f})")


def finding(table: Table, results: Mapping[Row, Sequence[Result]], baseline: Sequence[Result]) -> str:
    """What the differences of a table say, in a sentence; nothing without a baseline of several seeds."""
    gaps = differences_of(table, results, baseline)
    if not gaps or len(baseline) < 2:
        return ""
    different = [row.label for row in table.rows if row in significant(gaps)]
    verdict = f"{', '.join(different)} differ from FP32" if different else "no method differs from FP32"
    test = f"paired t-test over {len(baseline)} seeds, Holm's correction, {LEVEL:.0%}"
    return f"Of {len(gaps)} methods, {verdict} ({test})."


def readme_text(scale: str, results: Mapping[Table, Mapping[Row, Sequence[Result]]]) -> str:
    """All of README.md: how the runs were made, a table with its finding for each comparison, the plot."""
    runs = [result for rows in results.values() for sequence in rows.values() for result in sequence]
    sections = [INTRODUCTION.format(scale=scale, n_runs=len(runs), kernels=_used(runs, "kernels"))]
    for table, rows in results.items():
        iterations = max(result["iterations"] for sequence in rows.values() for result in sequence)
        baseline = _baseline(table, results)
        sections += [f"## {table.title}, {iterations} iterations", table_text(table, rows, baseline)]
        sections += [finding(table, rows, baseline)]
    sections += [f"![mAP of every run]({scale}.png)", f"![Learning curves]({scale}-curves.png)"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _baseline(table: Table, results: Mapping[Table, Mapping[Row, Sequence[Result]]]) -> Sequence[Result]:
    """The runs in float32 that a table's rows are compared with; none if there are none."""
    wanted = table.baseline or table.name
    runs = [
        runs
        for other, rows in results.items()
        if other.name == wanted
        for row, runs in rows.items()
        if row.is_baseline
    ]
    return runs[0] if runs else ()


def _used(runs: Sequence[Result], name: str) -> str:
    return ", ".join(sorted({str(result[name]) for result in runs}))


INTRODUCTION = """# Results

Written by `make results` (`python results/make_results.py --help`), from {n_runs} runs at the scale
`{scale}`; the logs that the figures come from lie in [`{scale}/`]({scale}). mAP is that of PASCAL VOC 2007
on test images, after the last iteration; mean ± standard deviation over seeds. Differences to FP32 are
means over the seeds, each with the run of the same seed; a run that diverged counts as an mAP of 0.
Kernels: {kernels}. Seconds are of runs that may have shared the machine with others; they are no benchmark.

The published figures are of SSD512 on PASCAL VOC, trained for 120,000 iterations on GPUs. What is trained
here on digits is a small SSD, on 1000 images that were made for it: scikit-learn's scans of handwritten
digits, 8x8 pixels each, enlarged, tinted and pasted on crops of two photographs; test images show other
digits. The network has far fewer and shallower layers than SSD512, and its gradients are large enough for
float16 as they are. Compare row with row, not column with column.

In the table of a multiplied loss the gradients of all layers are smaller by that factor on their way
through the network, and are multiplied back in float32 for the update. In float32 that changes nothing; in
float16 it shows what underflow costs. It is an experiment, no way to train."""
