"""Normalization to length 1 of float16 arrays, computed in float32 and rounded once to float16.

In float16 a sum of squares overflows as soon as the length exceeds 256. Arrays are NumPy's or CuPy's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ada_loss.arrays.casting import CHUNK
from ada_loss.arrays.library import cast, library_of


def l2_normalize(x: Any, axis: tuple[int, ...], eps: float) -> Any:
    """x / (|x| + eps), lengths taken over `axis`."""
    y = library_of(x).module.empty_like(x)
    for part in _parts(x, axis):
        wide = cast(x[part], np.float32)
        wide /= _lengths(wide, axis) + np.float32(eps)
        y[part] = cast(wide, np.float16)
    return y


def l2_normalize_grad(x: Any, gy: Any, axis: tuple[int, ...], eps: float) -> Any:
    """Gradient of `l2_normalize`'s input: with n = |x| + eps, (gy - x (x.gy) / (n |x|)) / n, where the
    fraction counts as 0 for |x| = 0."""
    xp = library_of(x).module
    gx = xp.empty_like(x)
    for part in _parts(x, axis):
        wide, gradient = cast(x[part], np.float32), cast(gy[part], np.float32)
        length = _lengths(wide, axis)
        norm = length + np.float32(eps)
        along = (wide * gradient).sum(axis=axis, keepdims=True)
        along /= norm * xp.where(length == 0, np.float32(np.inf), length)
        wide *= along
        gradient -= wide
        gradient /= norm
        gx[part] = cast(gradient, np.float16)
    return gx


def _lengths(x: Any, axis: tuple[int, ...]) -> Any:
    xp = library_of(x).module
    return xp.sqrt(xp.square(x).sum(axis=axis, keepdims=True))


def _parts(x: Any, axis: tuple[int, ...]) -> Iterator[slice]:
    """Cache-sized parts along the first axis; all of it where lengths are taken over it, and on a GPU."""
    n = len(x)
    whole = 0 in (a % x.ndim for a in axis) or not library_of(x).on_host
    step = max(1, n if whole else CHUNK * n // max(1, x.size))
    for start in range(0, n, step):
        yield slice(start, start + step)
