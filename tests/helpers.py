"""Assertions and models that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import chainer
import numpy as np

from ada_loss.chainer import AdaLossScaled


@contextmanager
def dtype(value: Any) -> Any:
    """Chainer's default dtype within a block: "float32", "float16" or "mixed16"."""
    with chainer.using_config("dtype", chainer.mixed16 if value == "mixed16" else np.dtype(value)):
        yield


def plain_gradients(link: chainer.Link, run: Callable[[chainer.Link], chainer.Variable]) -> dict[str, Any]:
    """Chainer's own parameter gradients of the loss that `run(link)` returns, by path."""
    link.cleargrads()
    run(link).backward()
    return {path: None if p.grad is None else p.grad.copy() for path, p in link.namedparams()}


def scoped_gradients(model: AdaLossScaled, run: Callable[[chainer.Link], chainer.Variable]) -> dict[str, Any]:
    """The true gradients of the same loss through a scope, by the same paths."""
    model.cleargrads()
    run(model).backward()
    return model.true_gradients()


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both hold the same paths, and the arrays are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        if array is None:
            assert actual[path] is None, path
        else:
            np.testing.assert_array_equal(actual[path], array, err_msg=path)


def signal_to_noise(actual: Any, reference: Any) -> float:
    """10 log10 of the reference's power over that of the difference, in dB; infinite where they are equal."""
    reference = np.asarray(reference, np.float64)
    noise = np.sum((np.asarray(actual, np.float64) - reference) ** 2)
    return float("inf") if noise == 0 else 10 * float(np.log10(np.sum(reference**2) / noise))


def assert_same_as_float32(actual: dict[str, Any], reference: dict[str, Any], *, db: float) -> None:
    """Every gradient reaches a signal-to-noise ratio of `db` against float32."""
    assert actual.keys() == reference.keys()
    ratios = {path: signal_to_noise(actual[path], reference[path]) for path in reference}
    assert min(ratios.values()) >= db, ratios
