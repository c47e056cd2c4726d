"""Element-wise functions of float16 arrays on the CPU, a cache-sized part at a time.

The activations work on the bits: a non-negative float16 orders as an integer does, and NumPy's integer
loops are vectorized where its float16 loops are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ada_loss.arrays.casting import CHUNK, cast, chunks, empty_in_order, memory_order, to_float16, to_float32

INFINITY = 0x7C00
"""Bits of float16 infinity: larger magnitudes are NaN."""

_ZEROS = np.zeros(CHUNK, np.int16)
"""NumPy's maximum is vectorized for arrays only."""
_MAGNITUDE = np.array(0x7FFF, np.int16)
_SIGN_SHIFT = np.array(15, np.int16)


def in_float32(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """An element-wise function of float16 arrays, broadcast, computed in float32 and rounded to float16."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    # What is repeated is widened once, in its own size.
    operands = [a if a.shape == shape else np.broadcast_to(to_float32(a), shape) for a in arrays]
    out = np.empty(shape, np.float16)
    for *parts, target in chunks(*operands, out):
        to_float16(function(*(cast(part, np.float32) for part in parts)), target)
    return out


def has_nan(x: np.ndarray) -> bool:
    """Whether any element of a floating-point array is NaN."""
    if x.dtype != np.float16:
        return bool(x.size and np.isnan(np.maximum.reduce(x, axis=None)))
    return any(
        np.maximum.reduce(part.view(np.int16), axis=None) > INFINITY
        or np.maximum.reduce(part.view(np.uint16), axis=None) > 0x8000 + INFINITY
        for (part,) in chunks(x)
    )


def relu(x: np.ndarray) -> np.ndarray | None:
    """max(x, 0) in float16; None if x contains a NaN, which this would hide."""
    if has_nan(x):
        return None
    x = np.asarray(x, order="C")
    y = np.empty(x.shape, np.float16)
    for part, target in chunks(x.view(np.int16).reshape(-1), y.view(np.int16).reshape(-1)):
        np.maximum(part, _ZEROS[: part.size], out=target)
    return y


def relu_grad(y: np.ndarray, gy: np.ndarray) -> np.ndarray | None:
    """gy where y > 0, else 0, in float16; None if gy is not finite everywhere, which this would hide, or y
    contains a NaN, which would count as positive."""
    axes = memory_order(y)
    gx = empty_in_order(y.shape, np.float16, axes)
    vectors = (np.asarray(a.transpose(axes), order="C").view(np.int16).reshape(-1) for a in (y, gy, gx))
    for outputs, gradient, target in chunks(*vectors):
        np.bitwise_and(gradient, _MAGNITUDE, target)
        if np.maximum.reduce(target) >= INFINITY:
            return None
        # All bits set where y is positive: its negative has the sign bit.
        np.maximum(outputs, _ZEROS[: outputs.size], out=target)
        if np.maximum.reduce(target) > INFINITY:
            return None
        np.negative(target, target)
        np.right_shift(target, _SIGN_SHIFT, target)
        np.bitwise_and(target, gradient, target)
    return gx


def total(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool) -> np.ndarray:
    """Sum of a float16 array over some axes, added in float32 and rounded once to float16."""
    return to_float16(float32_total(x, axis, keepdims))


def float32_total(x: np.ndarray, axis: tuple[int, ...] | None, keepdims: bool = False) -> np.ndarray:
    """Sum of a float16 array over some axes (None: all) in float32.

    Where the first axis is summed too, as in the gradient of a bias, a few of its rows at a time.
    """
    axes = tuple(range(x.ndim)) if axis is None else tuple(a % x.ndim for a in axis)
    if not x.size or 0 not in axes:
        return np.asarray(to_float32(x).sum(axis=axes, keepdims=keepdims))
    rows = max(1, CHUNK * len(x) // x.size)
    partial = (
        to_float32(x[start : start + rows]).sum(axis=axes, keepdims=keepdims)
        for start in range(0, len(x), rows)
    )
    return np.asarray(functools.reduce(np.add, partial))
