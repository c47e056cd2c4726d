"""Max pooling on the CPU, in any number of dimensions, without a padded copy.

Works tap by tap, a tap being one place in the window: all outputs see their value at that tap as one
strided slice of the input. float16 are compared as integers that order as they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ada_loss.arrays.casting import CHUNK, cast, empty_in_order, memory_order
from ada_loss.chainer.kernels.convolution import as_float32
from ada_loss.chainer.kernels.elementwise import INFINITY, has_nan

_MAGNITUDE = np.array(0x7FFF, np.int16)
_SIGN_SHIFT = np.array(15, np.int16)
_BITS = {2: np.int16, 4: np.int32, 8: np.int64}
"""Integers as wide as a floating-point number of so many bytes."""

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Window:
    """A pooling window; one number per spatial dimension each."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]

    @property
    def overlaps(self) -> bool:
        """Whether an input element can lie in several windows."""
        return any(k > s for k, s in zip(self.size, self.stride, strict=True))

    def taps(
        self, in_size: tuple[int, ...], out_size: tuple[int, ...]
    ) -> Iterator[tuple[int, Slices, Slices]]:
        """Every tap's number, the outputs for which it lies inside the input, and what they see there; both
        index arrays (images, channels, *spatial)."""
        for number, tap in enumerate(np.ndindex(*self.size)):
            outputs, inputs = [slice(None)] * 2, [slice(None)] * 2
            for t, s, p, n_in, n_out in zip(tap, self.stride, self.pad, in_size, out_size, strict=True):
                start = max(0, -((t - p) // s))
                stop = max(start, min(n_out, (n_in - 1 + p - t) // s + 1))
                first = start * s + t - p
                outputs.append(slice(start, stop))
                inputs.append(slice(first, first + (stop - start - 1) * s + 1 if stop > start else first, s))
            yield number, tuple(outputs), tuple(inputs)


def max_pool(
    x: np.ndarray, window: Window, out_size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Maxima of x's windows, (images, channels, *out_size) in x's type, and the number of the first tap that
    holds each, as uint8 of the same shape. None if x contains a NaN or the window more than 256 taps."""
    if math.prod(window.size) > 256 or has_nan(x):
        return None
    # Wider ones lie as Chainer's do, so that sums of them have the same bits.
    axes = memory_order(x) if x.dtype == np.float16 else tuple(range(x.ndim))
    y = empty_in_order((*x.shape[:2], *out_size), x.dtype, axes)
    indexes = np.zeros_like(y, np.uint8)
    for images in _groups(x.shape):
        if x.dtype == np.float16:
            _max_pool_halves_into(y[images], indexes[images], x[images], window)
        else:
            _max_pool_into(y[images], indexes[images], x[images], window, -np.inf)
    return y, indexes


def _max_pool_halves_into(y: np.ndarray, indexes: np.ndarray, x: np.ndarray, window: Window) -> None:
    keys, best = x.view(np.int16), y.view(np.int16)
    if np.minimum.reduce(keys, axis=None) < 0:
        keys = _to_keys(keys)
    _max_pool_into(best, indexes, keys, window, -INFINITY)
    if np.minimum.reduce(best, axis=None) < 0:
        best[...] = _from_keys(best)


def _max_pool_into(
    best: np.ndarray, indexes: np.ndarray, x: np.ndarray, window: Window, lowest: float
) -> None:
    best[...] = lowest
    for tap, outputs, inputs in window.taps(x.shape[2:], best.shape[2:]):
        leading, places = best[outputs], indexes[outputs]
        values = np.empty_like(leading)
        values[...] = x[inputs]
        if tap:
            larger = np.greater(values, leading).view(np.uint8)
            np.multiply(larger, np.uint8(tap), larger)
            np.maximum(places, larger, out=places)
        np.maximum(values, leading, out=leading)


def max_pool_grad(
    gy: np.ndarray, indexes: np.ndarray, window: Window, in_shape: tuple[int, ...]
) -> np.ndarray:
    """Gradient of max pooling's input in gy's type: every gradient goes where its maximum was; where several
    meet, they are added, float16 in float32 and rounded once."""
    gx = empty_in_order(in_shape, gy.dtype, memory_order(indexes))
    gx[...] = 0
    for images in _groups(in_shape):
        _max_pool_grad_into(gx[images], gy[images], indexes[images], window)
    return gx


def _max_pool_grad_into(gx: np.ndarray, gy: np.ndarray, indexes: np.ndarray, window: Window) -> None:
    taps = window.taps(gx.shape[2:], gy.shape[2:])
    # By their bits, because infinity times 0 would be NaN.
    if not window.overlaps:
        bits, target = _bits(gy), _bits(gx)
        for tap, outputs, inputs in taps:
            np.multiply(bits[outputs], indexes[outputs] == tap, target[inputs])
        return
    wide = as_float32(gy)
    bits, total = _bits(wide), np.zeros_like(gx, wide.dtype)
    for tap, outputs, inputs in taps:
        total[inputs] += np.multiply(bits[outputs], indexes[outputs] == tap).view(wide.dtype)
    gx[...] = cast(total, gx.dtype)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(_BITS[array.itemsize])


def _groups(shape: tuple[int, ...]) -> Iterator[slice]:
    """A few images of an array of this shape at a time, about as many as fit the cache."""
    step = max(1, CHUNK * shape[0] // math.prod(shape))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _to_keys(bits: np.ndarray) -> np.ndarray:
    """Integers that order as the float16 numbers with these bits do: the magnitude with its sign."""
    sign = np.right_shift(bits, _SIGN_SHIFT)
    keys = np.bitwise_and(bits, _MAGNITUDE)
    keys ^= sign
    keys -= sign
    return keys


def _from_keys(keys: np.ndarray) -> np.ndarray:
    """The inverse of `_to_keys`, with every zero positive."""
    sign = np.right_shift(keys, _SIGN_SHIFT)
    bits = keys ^ sign
    bits -= sign
    sign &= ~_MAGNITUDE
    bits |= sign
    return bits
