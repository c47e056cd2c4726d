"""Ways of scaling the loss, and a training run with one of them."""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import chainer
import numpy as np
from problems import Training

# How often on the way, and at the end, a model is looked at.
LOOKS = 10


class Scaler(Protocol):
    """A loss scaling, set up for the models of one run."""

    def step(self, number: int, loss: chainer.Variable) -> bool:
        """Update a model by the gradients of a loss; whether it was updated, and not skipped for overflow."""


class Plain:
    """Chainer's own backward and, in mixed16, its own update of float32 copies, with one scale throughout.

    A step whose gradients are not finite is skipped; the scale stays as it is.
    """

    def __init__(self, models: tuple[chainer.Link, ...], optimizers: tuple[Any, ...], scale: float) -> None:
        self._models, self._optimizers, self._scale = models, optimizers, scale
        for model, optimizer in zip(models, optimizers, strict=True):
            if chainer.config.dtype == chainer.mixed16:
                optimizer.use_fp32_update()
            optimizer.setup(model)
            optimizer.loss_scaling(scale=scale)

    def step(self, number: int, loss: chainer.Variable) -> bool:
        for model in self._models:
            model.cleargrads()
        loss.backward(loss_scale=self._scale)
        finite = all(np.isfinite(param.grad).all() for param in self._models[number].params())
        if finite:
            self._optimizers[number].update()
        return finite


class Adaptive:
    """This package, by the two lines of its page."""

    def __init__(
        self, models: tuple[chainer.Link, ...], optimizers: tuple[Any, ...], **settings: Any
    ) -> None:
        self._models, self._optimizers = models, optimizers
        for model, optimizer in zip(models, optimizers, strict=True):
            ada.prepare(optimizer.setup(ada.AdaLossScaled(model, **settings)))

    def step(self, number: int, loss: chainer.Variable) -> bool:
        for model in self._models:
            model.cleargrads()
        loss.backward()
        before = self._optimizers[number].entry_scale.skipped
        self._optimizers[number].update()
        return self._optimizers[number].entry_scale.skipped == before


@dataclass(frozen=True)
class Method:
    """A loss scaling.

    Attributes:
        name: in files and tables.
        dtype: Chainer's, for the whole run.
        start: sets it up for models and optimizers.
    """

    name: str
    dtype: Any
    start: Callable[[tuple[chainer.Link, ...], tuple[Any, ...]], Scaler]


FLOAT32 = Method("float32", np.dtype(np.float32), lambda models, optimizers: Plain(models, optimizers, 1.0))
AUTO = Method("auto", chainer.mixed16, Adaptive)
PAPER = Method(
    "approx_range",
    chainer.mixed16,
    lambda models, optimizers: Adaptive(models, optimizers, loss_scale_method="approx_range"),
)
# The growth interval is short because the runs are.
DYNAMIC = Method(
    "dynamic",
    chainer.mixed16,
    lambda models, optimizers: Adaptive(
        models, optimizers, loss_scale_method="fixed", init_scale=2.0**15, dynamic_interval=100
    ),
)


def fixed(exponent: int) -> Method:
    """One scale 2**exponent throughout; 0 is plain mixed16."""
    return Method(
        f"fixed 2^{exponent}",
        chainer.mixed16,
        lambda models, optimizers: Plain(models, optimizers, 2.0**exponent),
    )


def all_methods(training: Training) -> list[Method]:
    return [FLOAT32, AUTO, PAPER, DYNAMIC, *map(fixed, training.exponents)]


def some_methods(training: Training) -> list[Method]:
    """What tells whether plain mixed16 loses anything."""
    return [FLOAT32, AUTO, *map(fixed, training.exponents)]


def train(training: Training, method: Method, seed: int) -> dict[str, Any]:
    """A run: its errors on the way (pairs of iteration and error), its last one, the steps it skipped."""
    began = time.monotonic()
    curve: list[tuple[int, float]] = []
    skipped, outcome = 0, "finished"
    looks = {training.iterations * (i + 1) // LOOKS for i in range(LOOKS)}
    # Overflow is what is looked for here; NumPy need not tell.
    with chainer.using_config("dtype", method.dtype), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.random.seed(seed)
        problem = training.draw(seed)
        scaler = method.start(problem.models, training.optimizers())
        try:
            for iteration in range(training.iterations):
                for number, loss in problem.steps(iteration):
                    skipped += not scaler.step(number, loss)
                if iteration + 1 in looks:
                    with chainer.using_config("train", False), chainer.no_backprop_mode():
                        curve.append((iteration + 1, problem.error()))
        except ada.Diverged:
            outcome = "diverged"
    return {
        "training": training.name,
        "method": method.name,
        "seed": seed,
        "outcome": outcome,
        "error": curve[-1][1] if curve and outcome == "finished" else None,
        "skipped": skipped,
        "curve": curve,
        "seconds": round(time.monotonic() - began, 1),
    }
