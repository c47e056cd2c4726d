"""A link beside its wrapped copy: in float32 both have the same gradients, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import chainer
import chainer.functions as F
import numpy as np

from ada_loss.chainer import AdaLossScaled
from helpers import assert_same_bits

Run = Callable[..., chainer.Variable]


def wrapped_copy(link: chainer.Link, **settings: Any) -> AdaLossScaled:
    """A copy of a link in a scope whose rule chooses shifts of either sign, whatever the gradients."""
    return AdaLossScaled(
        copy.deepcopy(link), **{"loss_scale_method": "auto", "init_scale": 2.0**-7} | settings
    )


def gradients(model: chainer.Link, run: Run, arrays: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """The loss `run(model, *variables)` and the gradients of the model's parameters and of the variables."""
    np.random.seed(0)
    variables = [chainer.Variable(array) for array in arrays]
    model.cleargrads()
    loss = run(model, *variables)
    loss.backward()
    found = {path: _copied(parameter.grad) for path, parameter in model.namedparams()}
    return loss.array, found | {f"input {i}": _copied(x.grad) for i, x in enumerate(variables)}


def assert_exact(
    link: chainer.Link,
    arrays: Sequence[Any],
    run: Run | None = None,
    decisions: int | None = None,
    **settings: Any,
) -> AdaLossScaled:
    """Plain Chainer and a scope give the same loss and gradients; returns the wrapped link.

    run: makes a loss of the model and variables; by default a weighted sum of everything that the model
    returns. decisions: how many there have to be, some of them other than 0; at least one by default.
    """
    run = run or (lambda model, *xs: weighted_sum(model(*xs)))
    scaled = wrapped_copy(link, **settings)
    loss, found = gradients(scaled, run, arrays)
    expected_loss, expected = gradients(link, run, arrays)
    np.testing.assert_array_equal(loss, expected_loss)
    assert_same_bits(found, expected)
    shifts = [decision.shift for decision in scaled.decisions]
    assert any(shifts) if decisions is None else len(shifts) == decisions
    return scaled


def weighted_sum(results: Any) -> chainer.Variable:
    """A loss that depends on every element of every result in its own way."""
    if isinstance(results, tuple | list):
        return sum(weighted_sum(result) for result in results if result is not None)
    return F.sum(F.sin(results * 1.25) * _weights(results.shape))


def _weights(shape: tuple[int, ...]) -> Any:
    return np.linspace(-1, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def _copied(array: Any) -> Any:
    return None if array is None else array.copy()
