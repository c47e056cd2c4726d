"""The page and the picture: what the runs say, put into tables, sentences and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from methods import AUTO, DYNAMIC, FLOAT32, PAPER, Method, all_methods, fixed, some_methods
from problems import Training

Runs = Sequence[Mapping[str, Any]]

LABELS = {
    FLOAT32.name: "float32",
    AUTO.name: "adaptive (`auto`)",
    PAPER.name: "adaptive (`approx_range`)",
    DYNAMIC.name: "dynamic, interval 100",
    fixed(0).name: "no loss scale",
}
# A method that is no worse than this many times float32's error is as good as float32.
AS_GOOD = 1.05

INTRODUCTION = """\
# Where float16 fails by itself

In the other tables a loss was multiplied to show what a loss scale is for. Here nothing is multiplied:
these are trainings as people write them, in which plain `mixed16` loses accuracy, and some in which we
expected that and it does not. Written by `{command}` from {n_runs} runs, {seeds} seeds each, whose errors
lie in [`runs/`](runs).

Fixed scales are Chainer's own loss scaling with float32 copies of the weights; a step that overflows is
skipped, and the scale stays. *Dynamic* starts at 2^15, halves on overflow and doubles after 100 good steps.
All compute with the same kernels, on one CPU thread. Errors are of data that was not trained on, smaller is
better, mean ± standard deviation over seeds; *times float32* is the mean over seeds of the ratio to
float32's error with the same seed.

![Learning curves, and errors by scale](nature.png)
"""

ABOUT = {
    "beam": """\
A network learns the state of simply supported beams from place, length, load and stiffness, by the formulas
of Euler and Bernoulli. Its loss is the sum of four mean squared errors in SI units, as one writes it
without thinking of units: metres, radians, newton metres, newtons. Their variances differ by 12 orders of
magnitude, and so do the gradients of the four heads. A scale that keeps those of moment and shear force
from overflow leaves nothing of deflection's and rotation's.""",
    "nuclei": """\
Real data: scikit-learn's breast cancer set, ten measurements of cell nuclei, from whose means the spread
and the largest value of each are predicted, 20 heads in all. Squared errors are in the units of the data:
areas vary by 570, fractal dimensions by 0.003, variances by ten orders of magnitude. Without a loss scale
the largest gradients overflow in every step, and a little below the smallest are gone.""",
}

UNSEPARATED = """\
## Those that did not separate

Candidates in which we expected plain `mixed16` to fail. Gradients of deflections alone, in metres, are
small, but not below what float16 holds. Losses averaged over 30,000 to 60,000 pixels leave gradients of a
few of float16's smallest steps; rounding them is noise that the sum over pixels averages out. Sixteen
layers as Chainer initializes them shrink gradients by 2^8 or so. The critic of the adversarial pair is
never so sure of itself that the generator's gradients vanish. Runs are short, and the last two far from
converged: their errors differ more among seeds than among columns, either way.
"""


def page(separated: Sequence[Training], others: Sequence[Training], runs: Runs) -> str:
    """README.md as Markdown; trainings that did not run are left out."""
    seeds = len({run["seed"] for run in runs})
    command = "python results/nature/make_nature.py --kernels torch"
    parts = [INTRODUCTION.format(command=command, n_runs=len(runs), seeds=seeds)]
    for training in separated:
        if of(runs, training, fixed(training.exponents[-1])):
            parts.append(f"## {training.title}\n\n{ABOUT[training.name]}\n")
            parts.append(f"Error: {training.error_name}; {training.iterations} iterations.\n")
            parts.append(_table(training, runs) + "\n")
            parts.append(finding(training, runs) + "\n")
    ran = [training for training in others if of(runs, training, FLOAT32)]
    if ran:
        parts.append(UNSEPARATED)
        parts.append(_short_table(ran, runs) + "\n")
    return "\n".join(parts)


def finding(training: Training, runs: Runs) -> str:
    """What the runs of a training say, in sentences."""
    held = [k for k in training.exponents if ratio(runs, training, fixed(k)) is not None]
    ratios = {k: ratio(runs, training, fixed(k)) for k in held}
    best = min(held, key=lambda k: ratios[k])
    good = [k for k in held if ratios[k] <= AS_GOOD]
    if good:
        window = (
            f"Of the fixed scales tried, those from {_power(min(good))} to {_power(max(good))} are as good "
            f"as float32 to {AS_GOOD - 1:.0%}."
        )
    else:
        window = (
            f"No fixed scale of those tried is as good as float32 to {AS_GOOD - 1:.0%}; the best, "
            f"{_power(best)}, has {ratios[best]:.2f} times its error."
        )
    plain, auto, dynamic = (ratio(runs, training, method) for method in (fixed(0), AUTO, DYNAMIC))
    return (
        f"Without a loss scale the error is {_times(plain)} float32's, with a dynamic one {_times(dynamic)}, "
        f"with `auto` {_times(auto)}. {window}"
    )


def ratio(runs: Runs, training: Training, method: Method) -> float | None:
    """The mean over seeds of an error over float32's; None if a run of either diverged or is missing."""
    theirs = {run["seed"]: run["error"] for run in of(runs, training, FLOAT32)}
    ours = {run["seed"]: run["error"] for run in of(runs, training, method)}
    if not ours or not ours.keys() <= theirs.keys() or None in (*ours.values(), *theirs.values()):
        return None
    return mean(error / theirs[seed] for seed, error in ours.items())


def of(runs: Runs, training: Training, method: Method) -> list[Mapping[str, Any]]:
    """The runs of a training by a method."""
    return [run for run in runs if run["training"] == training.name and run["method"] == method.name]


def picture(path: Path, separated: Sequence[Training], runs: Runs) -> None:
    """A row for each training that separated: curves by method, and errors by fixed scale."""
    ran = [training for training in separated if of(runs, training, FLOAT32)]
    figure, axes = plt.subplots(
        len(ran), 2, figsize=(10, 3.2 * len(ran)), squeeze=False, layout="constrained", sharey="row"
    )
    for (left, right), training in zip(axes, ran, strict=True):
        for method, colour in (
            (FLOAT32, "black"),
            (AUTO, "#e6194b"),
            (DYNAMIC, "#f58231"),
            (fixed(0), "#4363d8"),
        ):
            _draw_curve(left, of(runs, training, method), LABELS[method.name].replace("`", ""), colour)
            errors = [run["error"] for run in of(runs, training, method) if run["error"] is not None]
            if method in (FLOAT32, AUTO) and errors:
                right.axhline(mean(errors), color=colour, linewidth=1.2, label=method.name)
        for exponent in training.exponents:
            errors = [run["error"] for run in of(runs, training, fixed(exponent)) if run["error"] is not None]
            right.plot([exponent] * len(errors), errors, "o", color="#4363d8", alpha=0.6, markersize=5)
        left.set_title(training.title, fontsize=10, loc="left")
        left.set_xlabel("iteration")
        left.set_ylabel("error")
        left.set_yscale("log")
        right.set_xlabel("fixed loss scale, log2")
        right.legend(fontsize=8)
        left.legend(fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_curve(axis: Any, runs: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
    for i, run in enumerate(runs):
        iterations, errors = zip(*run["curve"], strict=True)
        axis.plot(iterations, errors, color=colour, alpha=0.8, linewidth=1.2, label=label if i == 0 else None)


def _table(training: Training, runs: Runs) -> str:
    lines = ["| loss scaling | error | times float32 | steps skipped |", "| --- | ---: | ---: | ---: |"]
    for method in all_methods(training):
        found = of(runs, training, method)
        if found:
            skipped = mean(run["skipped"] for run in found) / training.iterations
            times = _times(ratio(runs, training, method))
            lines.append(
                f"| {_label(method)} | {_error(found)} | {times.removesuffix(' times')} | {skipped:.0%} |"
            )
    return "\n".join(lines)


def _short_table(trainings: Sequence[Training], runs: Runs) -> str:
    methods = some_methods(trainings[0])
    lines = [
        "| training | error is | " + " | ".join(_label(method) for method in methods) + " |",
        "| --- | --- |" + " ---: |" * len(methods),
    ]
    for training in trainings:
        cells = [_error(of(runs, training, method)) for method in methods]
        lines.append(f"| {training.title} | {training.error_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _error(runs: Sequence[Mapping[str, Any]]) -> str:
    errors = [run["error"] for run in runs]
    if not errors:
        return ""
    if None in errors:
        return f"{errors.count(None)} of {len(errors)} diverged"
    return f"{mean(errors):.4f}" + (f" ± {stdev(errors):.4f}" if len(errors) > 1 else "")


def _times(value: float | None) -> str:
    return "none, having diverged," if value is None else f"{value:.2f} times"


def _label(method: Method) -> str:
    return LABELS.get(method.name, method.name)


def _power(exponent: int) -> str:
    return f"2^{exponent}"
