"""`prepare`: the second line that a user writes."""

from __future__ import annotations

from typing import Any

from ada_loss.chainer.multi_node import prepare_multi_node
from ada_loss.chainer.optimizer import look_after, prepare_step, require_scopes
from ada_loss.chainer.own_updates import optimizers_inside
from ada_loss.chainer.settings import require_optimizer


def prepare(optimizer: Any) -> Any:
    """Make an optimizer take the gradients of `AdaLossScaled` models; returns the optimizer.

    Call it after `optimizer.setup(model)`, on a plain optimizer or on ChainerMN's multi-node optimizer; a
    second call changes nothing.

    Args:
        optimizer: one of `chainer.optimizers` or of their kind, or ChainerMN's multi-node optimizer.

    Returns:
        The optimizer.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it has no target yet, or its target holds no `AdaLossScaled`.
    """
    require_optimizer(optimizer)
    require_scopes(optimizer.target)
    look_after(optimizer.target)
    if "actual_optimizer" in vars(optimizer):
        return prepare_multi_node(optimizer)
    for inside in optimizers_inside(optimizer):
        prepare(inside)
    if not optimizers_inside(optimizer):
        prepare_step(optimizer)
    return optimizer
