"""`record`: writes down what a training in PyTorch does, for `python -m ada_loss.report`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ada_loss.core.maths import floor_log2
from ada_loss.core.record_file import MOST_BYTES, RecordFile
from ada_loss.core.recorder import RunRecorder
from ada_loss.core.records import RunHeader
from ada_loss.core.version import VERSION
from ada_loss.torch.grad_scaler import GradScaler
from ada_loss.torch.watching import Watch


class Recording:
    """The records of a training that goes on; `record` makes it.

    Call `end_step` after every `scaler.update()` and `end` after the last one; as a context manager it does
    the latter by itself.
    """

    def __init__(self, model: torch.nn.Module, scaler: Any, recorder: RunRecorder) -> None:
        self._scaler = scaler
        self._recorder = recorder
        self._watch = Watch(model, recorder, scale=self._scale, truth=not _is_true(scaler))
        self._before = self._state()
        self._watch.begin()

    @property
    def sampling(self) -> bool:
        """Whether the present step is sampled."""
        return self._recorder.sampling

    def end_step(self, loss: Any = None, metrics: Mapping[str, Any] | None = None) -> None:
        """Close a step, after `scaler.update()`.

        Args:
            loss: the true loss of the step, a number or a tensor. On a GPU it is only looked at where the
                step is recorded.
            metrics: further numbers that are worth knowing, by name.
        """
        self._watch.end()
        exponent, skipped = self._before
        self._before = self._state()
        recorded = self.sampling or self._before[1] > skipped
        self._recorder.end_step(
            loss=float(loss) if loss is not None and recorded else None,
            exponent=exponent,
            skipped=self._before[1] > skipped,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
        )
        self._watch.begin()

    def end(self, outcome: str = "finished") -> None:
        """Close the records, with one word on how the training ended."""
        self._watch.end()
        self._recorder.end(outcome)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.end("finished" if kind is None else kind.__name__)

    def _scale(self) -> float:
        """What gradients carry outside of this package's own scaling."""
        return 1.0 if self._scaler is None or _adaptive(self._scaler) else float(self._scaler.get_scale())

    def _state(self) -> tuple[int, int]:
        """The exponent with which gradients enter, and how many steps were skipped."""
        if self._scaler is None:
            return 0, 0
        if isinstance(self._scaler, GradScaler):
            return int(self._scaler._entry.exponent), self._scaler.skipped
        scale = float(self._scaler.get_scale())
        # PyTorch's scaler does not count: its scale falls when a step is skipped, and only then.
        before = getattr(self, "_before", (floor_log2(scale), 0))
        return floor_log2(scale), before[1] + (floor_log2(scale) < before[0])


def record(
    model: torch.nn.Module,
    out: str | os.PathLike[str],
    *,
    scaler: Any = None,
    every: int = 100,
    name: str | None = None,
    total: int | None = None,
    step: int = 0,
    most_bytes: int = MOST_BYTES,
) -> Recording:
    """Record a training: on sampled steps histograms of every layer's gradients and float16 results.

    Works with this package's `GradScaler`, with PyTorch's, and without one. Where gradients are not scaled
    layer by layer, a sampled step is computed once more in float32, which tells what it has lost.

    Args:
        model: the module that is trained, without a wrapper such as DistributedDataParallel.
        out: the directory of the run, in which `records.jsonl` is written.
        scaler: the `GradScaler`, if there is one.
        every: from how many steps one is sampled.
        name: what to call the run beside others; the method by default.
        total: how many steps are planned.
        step: the number of the first step, of a training that goes on: records are appended then.
        most_bytes: how large the file may grow.

    Returns:
        The recording, which wants to be told of the end of every step.

    Raises:
        TypeError: `model` is no module, or one that wraps another.
        ValueError: a number is out of range.
        OSError: the file cannot be made.
    """
    _check(model)
    method = _method(scaler)
    header = RunHeader(
        name=name or method,
        method=method,
        model=type(model).__name__,
        framework=f"PyTorch {torch.__version__}",
        adaptive=_adaptive(scaler),
        every=every,
        total=total,
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        settings=dict(vars(scaler._config)) if isinstance(scaler, GradScaler) else {},
        versions={
            "ada_loss": VERSION,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    )
    file = RecordFile(out, header, most_bytes=most_bytes, resume=step > 0)
    return Recording(model, scaler, RunRecorder(file, every=every, step=step))


def _check(model: Any) -> None:
    """Whether a model can be watched: its modules are called one by one, and may be called once more."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"record takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        raise TypeError(f"record takes the module inside {type(model).__name__}: pass model.module.")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "record cannot look into a compiled model: record a run of it as it was before torch.compile."
        )


def _adaptive(scaler: Any) -> bool:
    """Whether gradients have scales of their own."""
    ours = isinstance(scaler, GradScaler) and scaler.is_enabled()
    return ours and scaler._config.rule.measures


def _is_true(scaler: Any) -> bool:
    """Whether hardly any gradient underflows, as with scales of their own that have no bounds."""
    return _adaptive(scaler) and scaler._config.rule.scales_sums


def _method(scaler: Any) -> str:
    if scaler is None or not scaler.is_enabled():
        return "none"
    return scaler._config.loss_scale_method if isinstance(scaler, GradScaler) else "dynamic"
