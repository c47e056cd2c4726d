"""The training recipe of SSD: momentum, learning rate, decay of weights, doubled gradients of biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chainer
from chainer.optimizer_hooks import WeightDecay
from chainer.optimizers import MomentumSGD
from chainercv.links.model.ssd import GradientScaling

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BIAS_GRADIENT_FACTOR = 2
LR_DROP = 0.1
WARM_UP_START = 0.1


def learning_rate(base: float, steps: Sequence[int], warm_up: int, iteration: int) -> float:
    """The rate of the update after `iteration` updates: rises from a tenth, falls to a tenth at each step."""
    rate = base * LR_DROP ** sum(iteration >= step for step in steps)
    if iteration < warm_up:
        rate *= WARM_UP_START + (1 - WARM_UP_START) * iteration / warm_up
    return rate


def make_optimizer(target: chainer.Link, loss_multiplier: float) -> Any:
    """An optimizer with its hooks on all parameters of `target`.

    Gradients reach it multiplied by `loss_multiplier`, which is taken back first: on true float32 gradients
    that is exact, being a power of two, and what the multiplier did to them before is all that remains of it.
    """
    optimizer = MomentumSGD(momentum=MOMENTUM)
    optimizer.setup(target)
    for parameter in target.params():
        rule = parameter.update_rule
        if loss_multiplier != 1:
            rule.add_hook(GradientScaling(1 / loss_multiplier), name="LossMultiplier")
        if parameter.name == "b":
            rule.add_hook(GradientScaling(BIAS_GRADIENT_FACTOR))
        else:
            rule.add_hook(WeightDecay(WEIGHT_DECAY))
    return optimizer
