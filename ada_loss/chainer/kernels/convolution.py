"""Convolutions of float16 arrays on the CPU: float16 in, float32 products and sums, rounded once to float16.

Pure functions of NumPy arrays. Activations and gradients are float16, weights float16 or float32, bias
float16 or float32; shapes are Chainer's, (images, channels, height, width) and (out channels, in channels
per group, kernel height, kernel width). A few images at a time are brought to float32 (see `patches`), so
nothing of the batch's size exists in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ada_loss.arrays.casting import to_float16, to_float32
from ada_loss.chainer.kernels.patches import Geometry, Patches


def convolve(
    x: np.ndarray, W: np.ndarray, b: np.ndarray | None, geometry: Geometry, out_size: tuple[int, int]
) -> np.ndarray:
    """The convolution's output, (images, out channels, *out_size), in x's float16."""
    y = np.empty((len(x), len(W), *out_size), np.float16)
    if not y.size:
        return y
    weight = as_float32(W).reshape(geometry.groups, len(W) // geometry.groups, -1)
    bias = None if b is None else as_float32(b)[:, np.newaxis]
    for part in Patches(x, geometry, out_size):
        results = np.matmul(weight, part.columns).reshape(len(W), -1)
        if bias is not None:
            results += bias
        to_float16(part.cut(results), y[part.images, :, part.rows])
    return y


def convolve_grad_weight(x: np.ndarray, gy: np.ndarray, geometry: Geometry, dtype: np.dtype) -> np.ndarray:
    """Gradient of the weights, (out channels, in channels per group, *kernel), float16 or float32.

    x and gy are float16 or float32 each.
    """
    groups, out_channels = geometry.groups, gy.shape[1]
    in_channels = x.shape[1] // groups
    total = np.zeros((groups, in_channels * geometry.taps, out_channels // groups), np.float32)
    if gy.size:
        for part in Patches(x, geometry, gy.shape[2:]):
            embedded = part.embed(gy).reshape(groups, out_channels // groups, -1)
            total += np.matmul(part.columns, embedded.transpose(0, 2, 1))
    # In C's order, since ChainerMN leaves gradients of parameters in any other as they are.
    gradient = np.ascontiguousarray(total.transpose(0, 2, 1)).reshape(
        out_channels, in_channels, *geometry.kernel
    )
    return to_float16(gradient) if dtype == np.float16 else gradient


def convolve_grad_input(
    gy: np.ndarray, W: np.ndarray, b: np.ndarray | None, geometry: Geometry, in_size: tuple[int, int]
) -> np.ndarray:
    """Gradient of the input, (images, in channels, *in_size), in gy's float16; with a bias, a
    deconvolution."""
    if geometry.is_dense:
        # The same convolution walked backwards: channels exchanged, kernel mirrored, padded by the rest.
        pad = geometry.reach[0] - geometry.pad[0], geometry.reach[1] - geometry.pad[1]
        return convolve(gy, _mirror(W, geometry.groups), b, replace(geometry, pad=pad), in_size)
    return _scatter(gy, W, b, geometry, in_size)


def _mirror(W: np.ndarray, groups: int) -> np.ndarray:
    """Weights (out, in per group, kh, kw) as (in, out per group, kh, kw) with the kernel turned round."""
    out_channels, in_channels, kh, kw = W.shape
    grouped = W.reshape(groups, out_channels // groups, in_channels, kh, kw)[..., ::-1, ::-1]
    return grouped.transpose(0, 2, 1, 3, 4).reshape(groups * in_channels, -1, kh, kw)


def _scatter(
    gy: np.ndarray, W: np.ndarray, b: np.ndarray | None, geometry: Geometry, in_size: tuple[int, int]
) -> np.ndarray:
    """`convolve_grad_input` for any stride: every position's patch is added where it came from (col2im)."""
    groups, channels = geometry.groups, W.shape[1] * geometry.groups
    gx = np.empty((len(gy), channels, *in_size), np.float16)
    if not gx.size:
        return gx
    (sy, sx), (ph, pw), (dy, dx) = geometry.stride, geometry.pad, geometry.dilation
    (oh, ow), (h, w) = gy.shape[2:], in_size
    extent = geometry.extent((oh, ow))
    weight = as_float32(W).reshape(groups, len(W) // groups, -1).transpose(0, 2, 1)
    bias = 0 if b is None else as_float32(b).reshape(-1, 1, 1)
    for image, gradient in zip(gx, gy, strict=True):
        columns = np.matmul(weight, to_float32(gradient).reshape(groups, len(W) // groups, -1))
        patches = columns.reshape(channels, *geometry.kernel, oh, ow)
        plane = np.zeros((channels, max(extent[0], ph + h), max(extent[1], pw + w)), np.float32)
        for v, u in np.ndindex(geometry.kernel):
            plane[:, v * dy : v * dy + sy * oh : sy, u * dx : u * dx + sx * ow : sx] += patches[:, v, u]
        to_float16(plane[:, ph : ph + h, pw : pw + w] + bias, image)
    return gx


def as_float32(array: np.ndarray) -> np.ndarray:
    """A float16 array in float32; any other as it is."""
    return to_float32(array) if array.dtype == np.float16 else array
