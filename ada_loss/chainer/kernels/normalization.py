"""Normalization to length 1 of float16 arrays on the CPU, computed in float32 and rounded once to float16.

In float16 a sum of squares overflows as soon as the length exceeds 256.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ada_loss.casting import CHUNK, to_float16, to_float32


def l2_normalize(x: np.ndarray, axis: tuple[int, ...], eps: float) -> np.ndarray:
    """x / (|x| + eps), lengths taken over `axis`."""
    y = np.empty(x.shape, np.float16)
    for part in _parts(x.shape, axis):
        wide = to_float32(x[part])
        wide /= _lengths(wide, axis) + np.float32(eps)
        to_float16(wide, y[part])
    return y


def l2_normalize_grad(x: np.ndarray, gy: np.ndarray, axis: tuple[int, ...], eps: float) -> np.ndarray:
    """Gradient of `l2_normalize`'s input: with n = |x| + eps, (gy - x (x.gy) / (n |x|)) / n, where the
    fraction counts as 0 for |x| = 0."""
    gx = np.empty(x.shape, np.float16)
    for part in _parts(x.shape, axis):
        wide, gradient = to_float32(x[part]), to_float32(gy[part])
        length = _lengths(wide, axis)
        norm = length + np.float32(eps)
        along = np.sum(wide * gradient, axis=axis, keepdims=True)
        along /= norm * np.where(length == 0, np.float32(np.inf), length)
        wide *= along
        gradient -= wide
        gradient /= norm
        to_float16(gradient, gx[part])
    return gx


def _lengths(x: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(np.sum(np.square(x), axis=axis, keepdims=True))


def _parts(shape: tuple[int, ...], axis: tuple[int, ...]) -> Iterator[slice]:
    """Cache-sized parts along the first axis, or all of it where lengths are taken over it."""
    n = shape[0]
    whole = 0 in (a % len(shape) for a in axis)
    step = max(1, n if whole else CHUNK * n // max(1, int(np.prod(shape))))
    for start in range(0, n, step):
        yield slice(start, start + step)
