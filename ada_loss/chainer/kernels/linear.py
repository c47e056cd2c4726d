"""Products of float16 matrices on the CPU: float16 in, float32 products and sums, rounded once to float16.

The weights, which can be large, are brought to float32 a block of rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from ada_loss.arrays.casting import to_float16
from ada_loss.chainer.kernels.convolution import as_float32

_BLOCK_ELEMENTS = 1 << 22


def linear(x: np.ndarray, W: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """x @ W.T + b in x's float16.

    x: float16 (batch, in); W: float16 or float32 (out, in); b: float16 or float32 (out,) or None.
    """
    y, wide = np.empty((len(x), len(W)), np.float16), as_float32(x)
    bias = None if b is None else as_float32(b)
    for rows in _blocks(len(W), W.shape[1]):
        product = wide @ as_float32(W[rows]).T
        if bias is not None:
            product += bias[rows]
        to_float16(product, y[:, rows])
    return y


def linear_grad_data(W: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """gy @ W in gy's float16; shapes as in `linear`, gy float16 (batch, out)."""
    products = (as_float32(gy[:, rows]) @ as_float32(W[rows]) for rows in _blocks(*W.shape))
    return to_float16(functools.reduce(np.add, products))


def linear_grad_weight(x: np.ndarray, gy: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """gy.T @ x in `dtype`, float16 or float32; x and gy are float16 or float32 each."""
    gW, wide = np.empty((gy.shape[1], x.shape[1]), dtype), as_float32(x)
    for rows in _blocks(*gW.shape):
        product = as_float32(gy[:, rows]).T @ wide
        if gW.dtype == np.float16:
            to_float16(product, gW[rows])
        else:
            gW[rows] = product
    return gW


def _blocks(n_rows: int, width: int) -> Iterator[slice]:
    """At least one, which is empty if there are no rows."""
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, max(1, n_rows), step):
        yield slice(start, start + step)
