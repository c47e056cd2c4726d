"""Scales in the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainer.training import extension, extensions

from ada_loss.chainer.optimizer import named_scopes
from ada_loss.core.decision import Decision
from ada_loss.core.policy import ShiftPolicy


def observe_scales(
    optimizer_name: str = "main", *, layers: bool = False, prefix: str | None = None
) -> ObserveScales:
    """An extension that has the scales of an optimizer's model logged by `LogReport`.

    Every row of the log gets them as they are when it is written, whatever triggers it. They are also
    observed when the extension itself is triggered, once an epoch unless told otherwise, for extensions that
    do not go by the log.

    `PREFIX/exponent` is log2 of the entry scale, `PREFIX/skipped` how many steps have been skipped so far
    because gradients overflowed. With `layers` there are also, for every decision point as it was last
    measured, `PREFIX/shift/PATH`, log2 of the scale that the layer adds, and `PREFIX/zeros/PATH`, the share
    of its output gradient that is zero: what has underflowed, besides what ReLU and the like leave out
    (`fixed` measures nothing); `extensions.Record` tells the two apart. A model with several scopes has the
    path of each behind PREFIX.

    Args:
        optimizer_name: of the updater's optimizer.
        layers: whether every layer is of interest.
        prefix: what names begin with: `ada_loss`, or `ada_loss/NAME` for another optimizer than `main`.
    """
    if prefix is None:
        prefix = "ada_loss" if optimizer_name == "main" else f"ada_loss/{optimizer_name}"
    return ObserveScales(optimizer_name, layers, prefix)


class ObserveScales(extension.Extension):
    """What `observe_scales` describes."""

    trigger = 1, "epoch"
    priority = extension.PRIORITY_WRITER

    def __init__(self, optimizer_name: str, layers: bool, prefix: str) -> None:
        self._optimizer_name = optimizer_name
        self._layers = layers
        self._prefix = prefix
        self.name = f"observe_scales_{optimizer_name}"

    def initialize(self, trainer: Any) -> None:
        """Have the values put into every row of every log."""
        for entry in trainer._extensions.values():
            log = entry.extension
            if isinstance(log, extensions.LogReport):
                log._postprocess = self._completed(log._postprocess, trainer, log._keys)

    def __call__(self, trainer: Any) -> None:
        """Observe the values."""
        trainer.observation.update(self._values(trainer))

    def _completed(
        self, before: Callable[[dict[str, Any]], None] | None, trainer: Any, keys: Any
    ) -> Callable[[dict[str, Any]], None]:
        def complete(row: dict[str, Any]) -> None:
            values = self._values(trainer)
            row.update({name: value for name, value in values.items() if keys is None or name in keys})
            if before is not None:
                before(row)

        return complete

    def _values(self, trainer: Any) -> dict[str, float]:
        scopes = named_scopes(trainer.updater.get_optimizer(self._optimizer_name).target)
        found = {}
        for path, scope in scopes.items():
            start = self._prefix + path if len(scopes) > 1 else self._prefix
            readings = {**_entry(scope.policy), **(_of_layers(scope.policy) if self._layers else {})}
            found.update({f"{start}/{name}": value for name, value in readings.items()})
        return found


def _entry(policy: ShiftPolicy) -> dict[str, float]:
    return {"exponent": policy.entry.exponent, "skipped": policy.entry.skipped}


def _of_layers(policy: ShiftPolicy) -> dict[str, float]:
    readings: dict[str, float] = {}
    for decision in policy.decisions.values():
        readings[f"shift{_name(decision)}"] = decision.shift
        if decision.rule.measures:
            readings[f"zeros{_name(decision)}"] = decision.range.zeros
    return readings


def _name(decision: Decision) -> str:
    """The path, with what tells several decisions of one layer apart where there are several."""
    path, call, operand = decision.site
    path = path if path.startswith("/") else f"/{path}"
    return path + (f":{call}" if call else "") + (f".{operand}" if operand else "")
