"""Losses of skipped steps stay out of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chainer.training import extension


def leave_out_skipped(optimizer_name: str = "main") -> Callable[[Any], None]:
    """An extension that keeps what a skipped step reported out of `LogReport`'s means.

    The loss of such a step is often infinite or NaN, and so would be the mean of its whole interval. What
    other extensions observe, such as the learning rate, stays.

    Args:
        optimizer_name: of the optimizer whose skipped steps are meant.

    Returns:
        The extension. It runs in every iteration, before those that observe or log.
    """

    @extension.make_extension(trigger=(1, "iteration"), priority=extension.PRIORITY_WRITER + 1)
    def leave_out(trainer: Any) -> None:
        if trainer.updater.get_optimizer(optimizer_name).last_skip is not None:
            trainer.observation.clear()

    return leave_out
