"""What a kernel's result is compared with: Chainer's own code in float64, rounded once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import chainer
import numpy as np
import pytest

from ada_loss.chainer import kernels

HAS_TORCH = importlib.util.find_spec("torch") is not None
WITH_TORCH = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
EACH_PROVIDER = pytest.mark.parametrize("provider", ["numpy", pytest.param("torch", marks=WITH_TORCH)])
"""Runs a test under every provider that computes float16 in float32."""

FLOAT32_UNIT, FLOAT64_UNIT = 2.0**-24, 2.0**-53
"""Largest relative error of one operation."""

Function = Callable[..., chainer.Variable]


def run(
    function: Function, inputs: Sequence[np.ndarray], gy: np.ndarray | None, provider: str
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Output of `function` on variables, and the gradient of every input where the output's is gy."""
    variables = [chainer.Variable(array) for array in inputs]
    with kernels.using(provider):
        y = function(*variables)
        if gy is not None:
            y.grad = gy.astype(y.dtype, copy=False)
            y.backward()
    return y.array, [variable.grad for variable in variables]


def in_float64(
    function: Function, inputs: Sequence[np.ndarray], gy: np.ndarray | None
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """The same through Chainer's own code in float64."""
    return run(function, [array.astype(np.float64) for array in inputs], gy, "chainer")


def assert_rounded_once(
    actual: np.ndarray, exact: np.ndarray, magnitude: np.ndarray | float = 0.0, operations: int = 0
) -> None:
    """`actual` is `exact` rounded once to its dtype after so many float32 operations.

    A sum of n products, in any order, is within n + 1 float32 units of the sum of the products' magnitudes
    (`magnitude`); rounding to float16 adds half the spacing of float16 there. Of float64 the operations are
    float64 ones, on both sides.
    """
    assert actual.shape == exact.shape
    if not actual.size:
        return
    spacing = 0.0
    if actual.dtype == np.float16:
        amax = np.maximum(np.abs(actual), np.abs(exact).astype(np.float16))
        spacing = np.spacing(amax).astype(np.float64)
    unit = 2 * FLOAT64_UNIT if actual.dtype == np.float64 else FLOAT32_UNIT
    bound = spacing / 2 + 1.01 * (operations + 1) * unit * magnitude
    error = np.abs(actual.astype(np.float64) - exact)
    assert (error <= bound).all(), f"largest error in units of the bound: {np.max(error / bound)}"
