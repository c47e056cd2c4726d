"""The training recipe of SSD: momentum, learning rate, decay of weights, doubled gradients of biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chainer
from chainer.backends.cuda import get_array_module
from chainer.optimizer_hooks import WeightDecay
from chainer.optimizers import MomentumSGD
from chainercv.links.model.ssd import GradientScaling

from ada_loss.chainer import Diverged
from errors import caution

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
BIAS_GRADIENT_FACTOR = 2
LR_DROP = 0.1
WARM_UP_START = 0.1
# So many steps in a row without a finite gradient end a training in float32 as diverged.
PATIENCE = 8


def learning_rate(base: float, steps: Sequence[int], warm_up: int, iteration: int) -> float:
    """The rate of the update after `iteration` updates: rises from a tenth, falls to a tenth at each step."""
    rate = base * LR_DROP ** sum(iteration >= step for step in steps)
    if iteration < warm_up:
        rate *= WARM_UP_START + (1 - WARM_UP_START) * iteration / warm_up
    return rate


class CarefulMomentumSGD(MomentumSGD):
    """Skips a step whose gradients are not all finite, as one that `prepare` has prepared does itself.

    Attributes:
        skipped: how many steps were skipped so far.
    """

    skipped = 0
    _in_a_row = 0

    def check_nan_in_grads(self) -> None:
        bad = next((path for path, p in self.target.namedparams() if not _is_finite(p.grad)), None)
        self._loss_scaling_isnan = bad is not None
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if bad is None:
            return
        self.skipped += 1
        if self._in_a_row >= PATIENCE:
            raise Diverged(
                f"Training diverged: the gradient of {bad} was not finite in {PATIENCE} steps in a row. "
                "Lower the learning rate, or look for what makes the loss infinite."
            )
        caution(f"skipped a step, {self.skipped} so far: the gradient of {bad} is not finite.")

    def serialize(self, serializer: Any) -> None:
        super().serialize(serializer)
        self.skipped = int(serializer("skipped", self.skipped))
        self._in_a_row = int(serializer("skipped_in_a_row", self._in_a_row))


def _is_finite(gradient: Any) -> bool:
    return gradient is None or bool(get_array_module(gradient).isfinite(gradient).all())


def make_optimizer(target: chainer.Link, loss_multiplier: float) -> Any:
    """An optimizer with its hooks on all parameters of `target`.

    Gradients reach it multiplied by `loss_multiplier`, which is taken back first: on true float32 gradients
    that is exact, being a power of two, and what the multiplier did to them before is all that remains of it.
    """
    optimizer = CarefulMomentumSGD(momentum=MOMENTUM)
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
