"""How good float16 gradients are, against float32 ones of the same weights and inputs.

Gradients are linear in what the loss is multiplied by, so one forward pass serves every multiplier: its
backward pass starts from 2**k in place of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fidelity_cases import Batch, Case

import chainer  # isort: skip  (made importable by the cases)
import chainer.functions as F
import numpy as np

from ada_loss.chainer import AdaLossScaled
from ada_loss.core.formats import FLOAT16
from ada_loss.core.maths import floor_log2

Gradients = dict[str, np.ndarray]
"""True gradients in float64, by parameter path; what is not finite stays so."""

Masks = dict[str, np.ndarray]
"""Booleans for the elements of each gradient, by parameter path."""

KNOWN_DB = 40.0
"""A parameter counts if float32 knows its gradient this well; the others are zero in exact arithmetic."""


@dataclass(frozen=True)
class Quality:
    """Of one parameter's gradient.

    snr: signal-to-noise ratio in dB, -inf if an element is not finite. underflow: the share of zeros among
    the elements that some scale of this tensor could have kept.
    """

    snr: float
    underflow: float


@dataclass(frozen=True)
class Subject:
    """A network in float16, a batch, and the gradients that float32 has for the same weights and inputs."""

    case: Case
    model: chainer.Link
    batch: Batch
    reference: Gradients


def make_subject(case: Case, seed: int, steps: int) -> Subject:
    """A network after some training steps in float32, at its initial weights if `steps` is 0."""
    rng = np.random.default_rng([seed, 0])
    np.random.seed(seed)
    model = _build(case, np.float32)
    model.cleargrads()
    _run(case, model, case.batch(rng), np.float32)
    _train(case, model, rng, steps)
    for parameter in model.params():
        parameter.array[...] = parameter.array.astype(np.float16)
    batch = case.batch(np.random.default_rng([seed, 1]))
    half, double = (_copy_in(case, model, batch, dtype) for dtype in (np.float16, np.float64))
    single_gradients = plain_backward(case, model, batch, np.float32)(0)
    double_gradients = plain_backward(case, double, batch, np.float64)(0)
    known = {
        path: gradient
        for path, gradient in single_gradients.items()
        if signal_to_noise(gradient, double_gradients[path]) > KNOWN_DB
    }
    return Subject(case, half, batch, known)


def plain_backward(
    case: Case, model: chainer.Link, batch: Batch, dtype: Any = np.float16
) -> Callable[[int], Gradients]:
    """Chainer's own gradients: a function of k for the loss times 2**k, that times divided out again."""
    loss = _run(case, model, batch, dtype)

    def gradients(k: int) -> Gradients:
        _backward(model, loss, k)
        return {path: np.ldexp(p.grad.astype(np.float64), -k) for path, p in _parameters(model)}

    return gradients


def adaptive_backward(case: Case, model: AdaLossScaled, batch: Batch) -> Callable[[int], Gradients]:
    """Adaptive gradients of a fresh start: a function of m for the loss times 2**m, which is divided out."""
    loss = _run(case, model, batch, np.float16)

    def gradients(m: int) -> Gradients:
        model.ada_loss.policy.reset()
        _backward(model, loss, m)
        return {path: np.ldexp(g.astype(np.float64), -m) for path, g in model.true_gradients().items()}

    return gradients


def signal_to_noise(found: np.ndarray, expected: np.ndarray) -> float:
    """In dB; -inf if something found is not finite."""
    if not np.isfinite(found).all():
        return -math.inf
    signal, noise = float(np.square(expected).sum()), float(np.square(found - expected).sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def compare(found: Gradients, reference: Gradients, keepable: Masks) -> dict[str, Quality]:
    """The quality of each gradient in the reference."""
    return {
        path: Quality(
            signal_to_noise(found[path], expected),
            float(np.count_nonzero(keepable[path] & (found[path] == 0)) / max(1, keepable[path].sum())),
        )
        for path, expected in reference.items()
    }


@dataclass(frozen=True)
class Sweep:
    """Chainer's own gradients of a network, for every scale.

    qualities: for the loss times 2**k, by k, from where nothing arrives to where everything overflows.
    keepable: which elements some scale of their tensor could have kept: float16 can hold them beside the
    largest, and they are there at the largest k at which their tensor is finite. Others are zero for another
    reason: a ReLU that float16 closes, terms that cancel.
    """

    qualities: dict[int, dict[str, Quality]]
    keepable: Masks

    def at(self, k: int) -> dict[str, Quality]:
        return self.qualities[min(max(k, min(self.qualities)), max(self.qualities))]


def sweep(gradients: Callable[[int], Gradients], reference: Gradients) -> Sweep:
    """Try scales up and down from 1 until nothing is left to see."""
    found: dict[int, Gradients] = {}
    for direction in (1, -1):
        k = 0
        found.setdefault(k, gradients(k))
        while any(np.isfinite(found[k][path]).all() and found[k][path].any() for path in reference):
            k += direction
            found[k] = gradients(k)
    keepable = {path: _holdable(expected) for path, expected in reference.items()}
    for path, mask in keepable.items():
        mask &= found[max(k for k in found if np.isfinite(found[k][path]).all())][path] != 0
    return Sweep({k: compare(found[k], reference, keepable) for k in sorted(found)}, keepable)


def _holdable(expected: np.ndarray) -> np.ndarray:
    """What does not round to zero at the largest power of two at which nothing overflows."""
    magnitudes = np.abs(expected)
    return magnitudes * 2.0 ** floor_log2(FLOAT16.max / magnitudes.max()) > FLOAT16.smallest_subnormal / 2


def _dtype(dtype: Any) -> Any:
    """Chainer's setting; float16 stands for mixed16, in which batch normalization has float32 parameters."""
    return chainer.using_config("dtype", chainer.mixed16 if dtype == np.float16 else dtype)


def _build(case: Case, dtype: Any) -> chainer.Link:
    with _dtype(dtype):
        return case.build()


def _copy_in(case: Case, model: chainer.Link, batch: Batch, dtype: Any) -> chainer.Link:
    copy = _build(case, dtype)
    _run(case, copy, batch, dtype)
    sources = dict(_parameters(model))
    for path, parameter in _parameters(copy):
        parameter.array[...] = sources[path].array
    return copy


def _run(case: Case, model: chainer.Link, batch: Batch, dtype: Any) -> chainer.Variable:
    inputs, targets = batch
    with _dtype(dtype):
        outputs = model(*(x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return case.loss(*(F.cast(y, np.promote_types(y.dtype, np.float32)) for y in outputs), *targets)


def _backward(model: chainer.Link, loss: chainer.Variable, k: int) -> None:
    model.cleargrads()
    loss.grad = np.array(2.0**k, loss.dtype)
    with np.errstate(all="ignore"):
        loss.backward()


def _train(case: Case, model: chainer.Link, rng: np.random.Generator, steps: int) -> None:
    optimizer = chainer.optimizers.Adam(alpha=case.rate)
    optimizer.setup(model)
    for _ in range(steps):
        loss = _run(case, model, case.batch(rng), np.float32)
        model.cleargrads()
        loss.backward()
        optimizer.update()


def _parameters(model: chainer.Link) -> list[tuple[str, chainer.Parameter]]:
    return sorted(model.namedparams())
