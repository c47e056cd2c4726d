"""A link beside its wrapped copy: in float32 both have the same gradients, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from ada_loss.chainer import AdaLossScaled
from ada_loss.core.config import TIMINGS
from helpers import assert_same_bits, dtype, signal_to_noise

STEPS = 2

DECIBEL = 30
"""The signal-to-noise ratio that rounding leaves of float16 gradients of a few layers."""

Run = Callable[..., chainer.Variable]


def wrapped_copy(link: chainer.Link, **settings: Any) -> AdaLossScaled:
    """A copy of a link in a scope whose rule chooses shifts of either sign, whatever the gradients."""
    return AdaLossScaled(
        copy.deepcopy(link), **{"loss_scale_method": "auto", "init_scale": 2.0**-7} | settings
    )


def gradients(
    model: chainer.Link, run: Run, arrays: Sequence[Any], factor: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """The loss `run(model, *variables)` and the gradients of the model's parameters and of the variables.

    factor: what the loss counts, 1 if None.
    """
    np.random.seed(0)
    variables = [chainer.Variable(array) for array in arrays]
    model.cleargrads()
    loss = run(model, *variables)
    if factor is not None:
        loss.grad = np.full_like(loss.array, factor)
    loss.backward()
    found = {path: _copied(parameter.grad) for path, parameter in model.namedparams()}
    return loss.array, found | {f"input {i}": _copied(x.grad) for i, x in enumerate(variables)}


def assert_exact(
    link: chainer.Link,
    arrays: Sequence[Any],
    run: Run | None = None,
    decisions: int | None = None,
    mixed16: float | None = 2.0**-18,
    **settings: Any,
) -> AdaLossScaled:
    """Plain Chainer and a scope give the same loss and gradients; returns the wrapped link.

    They do so step after step, with timing of either kind, and in mixed16 as far as rounding allows.

    run: makes a loss of the model and variables; by default a weighted sum of everything that the model
    returns. decisions: how many there have to be, some of them other than 0; at least one by default.
    mixed16: what the loss counts in mixed16, by default so little that gradients would underflow without a
    scale; None for functions that Chainer has in float32 only.
    """
    run = run or (lambda model, *xs: weighted_sum(model(*xs)))
    if mixed16 is not None:
        assert_close_in_mixed16(link, arrays, run, mixed16, **settings)
    models = [wrapped_copy(link, **settings, timing=timing) for timing in TIMINGS]
    for _ in range(STEPS):
        loss, expected = gradients(link, run, arrays)
        for model in models:
            our_loss, found = gradients(model, run, arrays)
            np.testing.assert_array_equal(our_loss, loss)
            assert_same_bits(found, expected)
    scaled = models[0]
    shifts = [decision.shift for decision in scaled.ada_loss.decisions]
    assert any(shifts) if decisions is None else len(shifts) == decisions
    return scaled


def assert_close_in_mixed16(
    link: chainer.Link, arrays: Sequence[Any], run: Run, factor: float, **settings: Any
) -> None:
    """A loss that counts `factor` has float32's gradients in a mixed16 copy, up to rounding.

    Gradients that are next to nothing beside others are noise in float32 as well.
    """
    narrow, wide = copy.deepcopy(link), copy.deepcopy(link)
    _to_mixed16(narrow)
    arrays = [array.astype(np.float16) if array.dtype.kind == "f" else array for array in arrays]
    models = [wrapped_copy(narrow, **settings, timing=timing) for timing in TIMINGS]
    for ours, theirs in zip(narrow.params(), wide.params(), strict=True):
        if ours.array is not None:
            theirs.array = ours.array.astype(np.float32)
    for _ in range(STEPS):
        wide_arrays = [a.astype(np.float32) if a.dtype == np.float16 else a for a in arrays]
        _, expected = gradients(wide, run, wide_arrays, factor)
        norms = {path: 0 if g is None else np.linalg.norm(g) for path, g in expected.items()}
        for model in models:
            with dtype("mixed16"):
                _, found = gradients(model, run, arrays, factor)
            for path, _ in model.namedparams():
                assert (found[path] is None) == (expected[path] is None), path
                if norms[path] > 1e-3 * max(norms.values()):
                    ratio = signal_to_noise(found[path], expected[path])
                    assert ratio > DECIBEL, (path, ratio)


def _to_mixed16(link: chainer.Link) -> None:
    for child in link.links():
        kind = np.float32 if isinstance(child, L.BatchNormalization) else np.float16
        for parameter in child.params(include_uninit=False):
            if parameter.dtype != kind and parameter.name in child._params:
                parameter.array = parameter.array.astype(kind)


def weighted_sum(results: Any) -> chainer.Variable:
    """A loss that depends on every element of every result in its own way."""
    if isinstance(results, tuple | list):
        return sum(weighted_sum(result) for result in results if result is not None)
    wide = F.cast(results, np.float32) if results.dtype == np.float16 else results
    return F.sum(F.sin(wide * 1.25) * _weights(results.shape))


def _weights(shape: tuple[int, ...]) -> Any:
    return np.linspace(-1, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def _copied(array: Any) -> Any:
    return None if array is None else array.copy()


class Graph(chainer.Chain):
    """Three layers, combined by a function of them and of inputs."""

    def __init__(self, combine, size=4):
        super().__init__(a=L.Linear(size, size), b=L.Linear(size, size), c=L.Linear(size, size))
        self.combine = combine

    def forward(self, *xs):
        return self.combine(self, *xs)


class Two(chainer.Chain):
    """Two layers and whatever is done with them."""

    def __init__(self, compute):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))
        self.compute = compute

    def forward(self, *args, **kwargs):
        return self.compute(self, *args, **kwargs)


def draw(rng, *shape):
    return rng.standard_normal(shape or (3, 4)).astype(np.float32)


def wide(x):
    """What Chainer can add to a scope's results."""
    return F.cast(x, np.float32)


def exact(rng, combine, run=None, inputs=1, **keywords):
    return assert_exact(Graph(combine), [draw(rng) for _ in range(inputs)], run, **keywords)


class Noting(chainer.FunctionHook):
    """Notes the functions that it is called for, and what it is given."""

    name = "Noting"

    def __init__(self):
        self.calls = []

    def backward_preprocess(self, function, in_data, gys):
        self.calls.append(
            ("before", function.label, len(in_data), [gy.shape for gy in gys if gy is not None])
        )

    def backward_postprocess(self, function, in_data, gys):
        self.calls.append(("after", function.label, len(in_data), [gy.shape for gy in gys if gy is not None]))
