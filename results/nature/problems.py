"""What a training on this page is: a problem, how it is drawn from a seed, and how long it is trained."""

from __future__ import annotations

import ada_loss.chainer  # noqa: F401  isort: skip  (has to come before Chainer)

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import chainer
import chainer.functions as F
import numpy as np


class Problem(Protocol):
    """Models and their data, drawn from one seed in Chainer's dtype of the moment.

    Attributes:
        models: the links that are trained, each by an optimizer of its own.
    """

    models: tuple[chainer.Link, ...]

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        """The losses of an iteration, each with the number of the model to update before the next one."""

    def error(self) -> float:
        """How wrong the models are on data that they were not trained on; smaller is better."""


@dataclass(frozen=True)
class Training:
    """A problem and how it is trained.

    Attributes:
        name: of its files.
        title: what it is, in a few words.
        error_name: what `Problem.error` measures.
        draw: makes the problem of a seed.
        optimizers: one for each model.
        iterations: how long.
        exponents: of the fixed loss scales 2**k that are tried.
    """

    name: str
    title: str
    error_name: str
    draw: Callable[[int], Problem]
    optimizers: Callable[[], tuple[Any, ...]]
    iterations: int
    exponents: tuple[int, ...] = (0,)


def batch_indices(n_samples: int, size: int, seed: int, iteration: int) -> np.ndarray:
    """The samples of an iteration: each one once an epoch, in an order that follows from seed and epoch."""
    epoch, place = divmod(iteration, n_samples // size)
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    return order[place * size : (place + 1) * size]


def as_input(array: np.ndarray) -> np.ndarray:
    """An array in the dtype in which models compute."""
    return array.astype(chainer.get_dtype())


def in_float32(output: chainer.Variable) -> chainer.Variable:
    """A model's output in the dtype in which losses are computed."""
    return F.cast(output, np.float32)
