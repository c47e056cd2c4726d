"""Scales in the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainer.training import extension

from ada_loss.chainer.optimizer import named_scopes
from ada_loss.core.decision import Decision
from ada_loss.core.policy import ShiftPolicy


def observe_scales(
    optimizer_name: str = "main", *, layers: bool = False, prefix: str = "ada_loss"
) -> Callable[[Any], None]:
    """An extension that reports the scales of an optimizer's model, for `LogReport` to log.

    It reports `PREFIX/exponent`, log2 of the entry scale, and `PREFIX/skipped`, how many steps have been
    skipped so far because gradients overflowed. With `layers` also, for every decision point as it was last
    measured, `PREFIX/shift/PATH`, log2 of the scale that the layer adds, and `PREFIX/zeros/PATH`, the share
    of its output gradient that is zero: what has underflowed, besides what ReLU and the like leave out
    (`fixed` measures nothing). A model with several scopes has the path of each behind PREFIX.

    It runs once an epoch; give it the trigger of `LogReport`, which otherwise logs a mean over several calls.
    """

    @extension.make_extension(trigger=(1, "epoch"), priority=extension.PRIORITY_WRITER)
    def observe(trainer: Any) -> None:
        scopes = named_scopes(trainer.updater.get_optimizer(optimizer_name).target)
        for path, scope in scopes.items():
            start = prefix + path if len(scopes) > 1 else prefix
            readings = {**_entry(scope.policy), **(_layers(scope.policy) if layers else {})}
            for name, value in readings.items():
                trainer.observation[f"{start}/{name}"] = value

    return observe


def _entry(policy: ShiftPolicy) -> dict[str, float]:
    return {"exponent": policy.entry.exponent, "skipped": policy.entry.skipped}


def _layers(policy: ShiftPolicy) -> dict[str, float]:
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
