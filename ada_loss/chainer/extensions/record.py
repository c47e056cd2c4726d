"""Records of a trainer's run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import chainer
import numpy as np
from chainer.training import extension

from ada_loss.chainer.recording import Recording, number, record
from ada_loss.chainer.snapshot import load_optional


class Record(extension.Extension):
    """Records a training into the trainer's output directory, for `python -m ada_loss.report`.

    On sampled steps: histograms of every layer's float16 gradients and results, scales, the loss; and every
    skipped step. A training that is resumed goes on in the same file.

    Args:
        every: from how many iterations one is sampled.
        optimizer_name: of the updater's optimizer.
        out: the directory, if not the trainer's.
        loss: under which name the loss is observed.
        metrics: names of what is to be recorded whenever it is observed, besides what validation finds.
        name: what to call the run beside others; its method by default.
    """

    trigger = 1, "iteration"
    # After evaluators, whose results are recorded too.
    priority = extension.PRIORITY_READER - 1
    name = "ada_loss_record"

    def __init__(
        self,
        every: int = 100,
        *,
        optimizer_name: str = "main",
        out: str | os.PathLike[str] | None = None,
        loss: str = "main/loss",
        metrics: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        self._every = every
        self._optimizer_name = optimizer_name
        self._out = out
        self._loss = loss
        self._metric_names = frozenset(metrics)
        self._name = name
        self._recording: Recording | None = None
        self._lost: float | None = None
        self._outcome = "finished"

    @property
    def lost(self) -> float | None:
        """The largest share that any gradient had lost in the latest sampled step; None before the first."""
        return self._lost if self._recording is None else self._recording.lost

    def initialize(self, trainer: Any) -> None:
        """Begin: called before the first iteration."""
        updater = trainer.updater
        stop = trainer.stop_trigger
        iterations = getattr(stop, "period", None) if getattr(stop, "unit", "") == "iteration" else None
        self._recording = record(
            updater.get_optimizer(self._optimizer_name),
            trainer.out if self._out is None else self._out,
            every=self._every,
            name=self._name,
            total=iterations,
            step=updater.iteration,
            lost=self._lost,
        )

    def __call__(self, trainer: Any) -> None:
        """Close an iteration."""
        assert self._recording is not None, "Chainer initializes extensions before it calls them."
        observed = trainer.observation
        self._recording.end_step(observed.get(self._loss), self._metrics(observed))

    def serialize(self, serializer: Any) -> None:
        """Keep the share that was lost last, so that the log of a run that is resumed goes on with it."""
        if isinstance(serializer, chainer.Serializer):
            serializer("lost", np.array(math.nan if self.lost is None else self.lost))
        else:
            lost = load_optional(serializer, "lost")
            self._lost = None if lost is None or math.isnan(lost) else float(lost)

    def on_error(self, trainer: Any, error: Exception, traceback: Any) -> None:
        """Note what ended the training."""
        self._outcome = type(error).__name__.lower()

    def finalize(self) -> None:
        """Close the records."""
        if self._recording is not None:
            self._recording.end(self._outcome)
            self._recording = None

    def _metrics(self, observed: Mapping[str, Any]) -> dict[str, float]:
        """What evaluators have found; on sampled steps also the other numbers beside the loss."""
        sampling = self._recording is not None and self._recording.sampling
        found = {}
        for name, value in observed.items():
            evaluated = name.startswith("validation/") or name in self._metric_names
            # The loss may have parts, which would only take room.
            if evaluated or sampling and name.startswith("main/") and not name.startswith(self._loss):
                try:
                    found[name] = number(value)
                except (TypeError, ValueError):
                    # An evaluator may report anything, such as an array with a value for every class.
                    continue
        return found
