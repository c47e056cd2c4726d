"""A small training in NumPy that records itself: a residual network with a second task, backward in float16.

What float16 loses it really loses here: gradients are rounded to float16 at every layer, at the scale that
the method has there, and compared element by element with float32's of the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ada_loss.core.histogram import Histogram
from ada_loss.core.record_file import RecordFile
from ada_loss.core.recorder import RunRecorder
from ada_loss.core.records import (
    ACTIVATION,
    BIAS_GRADIENT,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Place,
    RunHeader,
    Shift,
)

METHODS = ("none", "fixed", "dynamic", "auto")
FLOAT16_MAX = 65504.0


@dataclass
class Task:
    """How difficult to make it: `aux` multiplies the loss of the second task, `loss` all of it; `broken_at`
    makes an activation overflow from that step on."""

    layers: int = 8
    width: int = 32
    batch: int = 64
    loss: float = 2.0**-8
    aux: float = 2.0**-24
    gain: float = 1.0
    broken_at: int | None = None
    seed: int = 0


@dataclass
class Scales:
    """The scale of a method: one for all, which a dynamic one moves, or one for every layer."""

    method: str
    exponent: int = 0
    good: int = 0
    skipped: int = 0

    def of(self, peak: float, carried: int) -> int:
        """The exponent of a gradient whose true largest element is `peak`."""
        if self.method != "auto" or not 0 < peak < np.inf:
            return carried
        return int(np.floor(np.log2(FLOAT16_MAX / peak))) - 4

    def after(self, finite: bool) -> None:
        self.skipped += not finite
        if self.method == "dynamic":
            self.good = self.good + 1 if finite else 0
            self.exponent += (self.good > 0 and self.good % 10 == 0) - (not finite)


@dataclass
class Backward:
    """Gradients of one step, in float32 and as float16 keeps them, told to a recorder."""

    recorder: Any
    scales: Scales
    found: dict[str, Any] = field(default_factory=dict)
    began: Place | None = None

    @property
    def finite(self) -> bool:
        return self.began is None

    def keep(self, place: Place, true: Any, kept: Any, carried: int) -> tuple[Any, int]:
        """Round the true value `kept` of this run to float16; the rounded true value, and its exponent."""
        exponent = self.scales.of(float(np.max(np.abs(kept))), carried)
        flying = np.ldexp(kept, exponent).astype(np.float32).astype(np.float16)
        if self.began is None and not np.isfinite(flying).all():
            self.began = place
        if self.recorder.sampling:
            self.recorder.observe(
                place,
                Histogram.of(flying, exponent),
                exponent=exponent,
                shift=Shift(
                    exponent - carried + 4, exponent - carried + 8, exponent - carried, exponent - carried
                ),
                lost=int(np.sum((flying == 0) & (true != 0))),
                reference=Histogram.of(true),
            )
        kept = np.ldexp(flying.astype(np.float64), -exponent)
        if place.kind in (WEIGHT_GRADIENT, BIAS_GRADIENT):
            self.found[place.path] = kept
        return kept, exponent


@np.errstate(all="ignore")
def train(
    directory: Path,
    method: str,
    task: Task | None = None,
    *,
    steps: int = 60,
    every: int = 5,
    end: bool = True,
) -> Path:
    """Train and record; the directory."""
    task = task or Task()
    rng = np.random.default_rng(task.seed)
    weights = initial_weights(rng, task)
    inputs = rng.normal(size=(1024, task.width)).astype(np.float32)
    labels = np.argmax(inputs @ rng.normal(size=(task.width, 4)), axis=1)
    header = RunHeader(
        name={"fixed": "fixed 128"}.get(method, method),
        method=method,
        model=f"Residual{task.layers}",
        framework="NumPy",
        adaptive=method == "auto",
        every=every,
        total=steps,
        versions={"numpy": np.__version__},
    )
    recorder = RunRecorder(RecordFile(directory, header), every=every)
    scales = Scales(method, exponent={"fixed": 7, "dynamic": 20}.get(method, 0))
    for step in range(steps):
        chosen = rng.integers(0, len(inputs), task.batch)
        loss, accuracy, backward = one_step(
            weights, inputs[chosen], labels[chosen], recorder, scales, task, step
        )
        if backward.finite:
            for path, gradient in backward.found.items():
                weights[path] -= (0.05 / task.loss * gradient).astype(np.float32)
        recorder.end_step(
            loss=loss,
            exponent=scales.exponent,
            skipped=not backward.finite,
            began=backward.began,
            metrics={"accuracy": accuracy} if step % every == 0 else None,
        )
        scales.after(backward.finite)
    if end:
        recorder.end()
    return directory


def initial_weights(rng: Any, task: Task) -> dict[str, Any]:
    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        return (rng.normal(size=(rows, columns)) * gain / np.sqrt(rows)).astype(np.float32)

    found: dict[str, Any] = {}
    for number in range(task.layers - 2):
        found[f"/body/block{number + 1}/W"] = matrix(task.width, task.width, task.gain / np.sqrt(task.layers))
        found[f"/body/block{number + 1}/b"] = np.zeros(task.width, np.float32)
    for head in ("/head", "/aux"):
        found[f"{head}/W"], found[f"{head}/b"] = matrix(task.width, 4), np.zeros(4, np.float32)
    return found


def one_step(
    weights: dict[str, Any], x: Any, labels: Any, recorder: Any, scales: Scales, task: Task, step: int
) -> tuple[float, float, Backward]:
    """Loss, accuracy and gradients of one batch."""
    blocks = [f"/body/block{number + 1}" for number in range(task.layers - 2)]
    hidden = [x]
    active = []
    backward = Backward(recorder, scales)
    for path in blocks:
        z = hidden[-1] @ weights[f"{path}/W"] + weights[f"{path}/b"]
        if task.broken_at is not None and step >= task.broken_at and path == blocks[len(blocks) // 2]:
            z = z * np.float32(1e7)
        active.append(z > 0)
        hidden.append(hidden[-1] + np.maximum(z, 0))
        half = hidden[-1].astype(np.float16)
        if backward.began is None and not np.isfinite(half).all():
            backward.began = Place(path, ACTIVATION)
        if recorder.sampling:
            recorder.observe(Place(path, ACTIVATION), Histogram.of(half))
    top = hidden[-1]
    logits = top @ weights["/head/W"] + weights["/head/b"]
    guess = top @ weights["/aux/W"] + weights["/aux/b"]
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    right = np.eye(4)[labels]
    loss = -np.mean(np.log(probability[right == 1] + 1e-30)) + 0.5 * np.mean((guess - x[:, :4]) ** 2)
    g = {
        "/head": (probability - right) / len(x) * task.loss,
        "/aux": (guess - x[:, :4]) / guess.size * task.loss * task.aux,
    }
    below = [through(backward, weights, path, top, gy, gy, scales.exponent) for path, gy in g.items()]
    true, kept = (sum(parts) for parts in zip(*(pair[:2] for pair in below), strict=True))
    exponent = min(pair[2] for pair in below)
    for path, mask, h in reversed([*zip(blocks, active, hidden[:-1], strict=True)]):
        inner = through(backward, weights, path, h, true * mask, kept * mask, exponent)
        true, kept, exponent = true + inner[0], kept + inner[1], inner[2]
    return float(loss), float(np.mean(np.argmax(logits, 1) == labels)), backward


def through(
    backward: Backward, weights: dict[str, Any], path: str, h: Any, true: Any, kept: Any, exponent: int
) -> tuple[Any, Any, int]:
    """A layer's gradients: of its parameters, which are told, and of its input, which is returned."""
    backward.keep(Place(f"{path}/W", WEIGHT_GRADIENT), h.T @ true, h.T @ kept, exponent)
    backward.keep(Place(f"{path}/b", BIAS_GRADIENT), true.sum(0), kept.sum(0), exponent)
    w = weights[f"{path}/W"].astype(np.float64)
    below, carried = backward.keep(Place(path, INPUT_GRADIENT), true @ w.T, kept @ w.T, exponent)
    return true @ w.T, below, carried
