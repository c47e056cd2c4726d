"""`record`: writes down what a training in Chainer does, for `python -m ada_loss.report`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import chainer
import numpy as np
from chainer.backends import cuda

from ada_loss.chainer.optimizer import scopes
from ada_loss.chainer.watching import Watch
from ada_loss.core.maths import floor_log2
from ada_loss.core.record_file import MOST_BYTES, RecordFile
from ada_loss.core.recorder import RunRecorder
from ada_loss.core.records import ACTIVATION, INPUT_GRADIENT, Place, RunHeader
from ada_loss.core.version import VERSION


class Recording:
    """The records of a training that goes on; `record` makes it.

    In a loop of one's own, call `end_step` after every update and `end` after the last one; it is a context
    manager that does the latter. A trainer has `extensions.Record` do it.
    """

    def __init__(self, optimizer: Any, recorder: RunRecorder) -> None:
        self._optimizer = optimizer
        self._recorder = recorder
        self._watch = Watch(optimizer.target, recorder)
        self._skips = self._skipped()
        self._exponent = self._entry_exponent()
        self._watch.begin()

    @property
    def sampling(self) -> bool:
        """Whether the present step is sampled."""
        return self._recorder.sampling

    @property
    def lost(self) -> float | None:
        """The largest share that any gradient had lost in the latest sampled step; None before the first."""
        return self._recorder.lost

    def end_step(
        self, loss: Any = None, metrics: Mapping[str, Any] | None = None, *, began: Place | None = None
    ) -> None:
        """Close a step, after the optimizer's update.

        Args:
            loss: the true loss of the step, a number, array or variable.
            metrics: further numbers that are worth knowing, by name.
            began: where an overflow began, if that is known.
        """
        self._watch.end()
        skips = self._skipped()
        skip = getattr(self._optimizer, "last_skip", None)
        if began is None and skip is not None and skip.path and not self.sampling:
            began = Place(skip.path, ACTIVATION if skip.forward else INPUT_GRADIENT)
        self._recorder.end_step(
            loss=None if loss is None else number(loss),
            exponent=self._exponent,
            skipped=skips > self._skips,
            began=began,
            metrics={name: number(value) for name, value in (metrics or {}).items()},
        )
        self._skips, self._exponent = skips, self._entry_exponent()
        self._watch.begin()

    def end(self, outcome: str = "finished") -> None:
        """Close the records, with one word on how the training ended."""
        self._watch.end()
        self._recorder.end(outcome)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.end("finished" if kind is None else kind.__name__)

    def _skipped(self) -> int:
        found = scopes(self._optimizer.target)
        if found:
            return found[0].policy.entry.skipped
        # A plain optimizer only tells of its last update.
        return self._recorder.skipped + bool(getattr(self._optimizer, "_loss_scaling_isnan", False))

    def _entry_exponent(self) -> int:
        found = scopes(self._optimizer.target)
        power = floor_log2(self._optimizer._loss_scale or 1)
        return power + (found[0].policy.entry.exponent if found else 0)


def record(
    optimizer: Any,
    out: str | os.PathLike[str],
    *,
    every: int = 100,
    name: str | None = None,
    total: int | None = None,
    step: int = 0,
    lost: float | None = None,
    most_bytes: int = MOST_BYTES,
) -> Recording:
    """Record a training: on sampled steps histograms of every layer's float16 gradients and results.

    Works on plain and scaled models alike. Every `every`-th step a plain model's backward pass is computed
    three times, and a scaled one's arrays are counted: in all well below 1 % with the default.

    Args:
        optimizer: set up with the model, and prepared, if it is to be.
        out: the directory of the run, in which `records.jsonl` is written.
        every: from how many steps one is sampled.
        name: what to call the run beside others; the method by default.
        total: how many steps are planned.
        step: the number of the first step, of a training that goes on: records are appended then.
        lost: the share that was lost in the latest sampled step before that.
        most_bytes: how large the file may grow.

    Returns:
        The recording, which wants to be told of the end of every step.

    Raises:
        ValueError: the optimizer has no target, or a number is out of range.
        OSError: the file cannot be made.
    """
    if getattr(optimizer, "target", None) is None:
        raise ValueError("Call optimizer.setup(model) before recording.")
    found = scopes(optimizer.target)
    config = found[0].config if found else None
    method, usual_name = _method(optimizer, config)
    header = RunHeader(
        name=name or usual_name,
        method=method,
        model=type(optimizer.target).__name__,
        framework=f"Chainer {chainer.__version__}",
        adaptive=config is not None and config.rule.measures,
        every=every,
        total=total,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        settings={} if config is None else dict(vars(config)),
        versions={
            "ada_loss": VERSION,
            "chainer": chainer.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
    file = RecordFile(out, header, most_bytes=most_bytes, resume=step > 0)
    recorder = RunRecorder(file, every=every, step=step)
    recorder.lost = lost
    return Recording(optimizer, recorder)


def scale_range(optimizer: Any) -> tuple[int, int]:
    """The smallest and the largest exponent with which gradients leave the layers of an optimizer's model, as
    they were last scaled."""
    power = floor_log2(optimizer._loss_scale or 1)
    found = [
        power + decision.exponent + decision.shift
        for scope in scopes(optimizer.target)
        for decision in scope.decisions
    ]
    return min(found, default=power), max(found, default=power)


def number(value: Any) -> float:
    """A number, an array of one element or a variable of one, as a number."""
    array = getattr(value, "array", value)
    return float(cuda.to_cpu(array) if hasattr(array, "dtype") else array)


def _method(optimizer: Any, config: Any) -> tuple[str, str]:
    """The method of a run, and what to call it."""
    scale = optimizer._loss_scale or 1
    if config is not None and config.rule.measures:
        return config.loss_scale_method, config.loss_scale_method
    if config is not None:
        scale *= config.init_scale
        if config.dynamic_interval is not None:
            return "dynamic", f"dynamic {config.dynamic_interval}"
    if getattr(optimizer, "_loss_scaling_is_dynamic", False):
        return "dynamic", "dynamic"
    return ("none", "none") if scale == 1 else ("fixed", f"fixed {scale:g}")
