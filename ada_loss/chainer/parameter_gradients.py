"""Gradients that add up many elements of gy, over a batch or over positions: those of parameters above all.

What gy's size says of a layer's input gradient it does not say of these: they can be larger by thousands.
Rules that promise never to overflow (`Rule.scales_sums`) therefore give them exponents of their own.
On a GPU, where looking at a sum would mean to wait for it, they share the exponent of gy as under the paper's
rules, and a step in which one overflows is skipped.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ada_loss.arrays.library import all_finite, amax_of, library_of
from ada_loss.chainer.gradient import ScaledGradient, shifted
from ada_loss.chainer.kernels.elementwise import float32_total
from ada_loss.chainer.products import (
    backward_arrays,
    backward_with_weight,
    constant_of,
    gradient_by_constant,
    products_of,
)
from ada_loss.core.alignment import HEADROOM
from ada_loss.core.formats import FLOAT16
from ada_loss.core.maths import floor_log2

_LEAF_HEADROOM = 1
"""How many powers of two the gradient of a parameter keeps to the largest float16: so much as an addition
takes. That of weights that were computed goes through functions that may enlarge it, and keeps `HEADROOM`."""

_RETREAT, _RETREATS = 4, 6
"""By how many powers of two gy is lowered when a sum of it overflows, and how often at most."""

_ZERO = np.zeros(1, np.float32)
"""Stands for every element of a weight. Nothing writes to it, though it could: of an array that is read-only
PyTorch would be given a copy."""


def parameter_gradients(
    function: Any, targets: tuple[int, ...], gy: Any, exponent: int, backoff: int = 0
) -> dict[int, ScaledGradient]:
    """Gradients of a layer's float16 weight and bias, by input, each at the largest scale that it can have.

    They are added up in float32 where the kernels do so anyway, and rounded once the largest element is
    known. One that is not finite is left out: what overflowed may have been added up in float16.
    gy: the layer's output gradient, an array that carries `exponent`. backoff: of the entry scale.
    """
    products = products_of(function)
    if gy.dtype != np.float16 or not library_of(gy).on_host or len(products) != 1:
        return {}
    weight, bias = products[0].weight, 2
    halves = [index for index in targets if function.inputs[index].dtype == np.float16]
    sums = {}
    if weight in halves:
        # Chainer gives the gradient the dtype of the weight, whose values do not matter here.
        shape = function.inputs[weight].shape
        wide = np.ndarray(shape, np.float32, _ZERO, strides=(0,) * len(shape))
        sums[weight] = backward_with_weight(function, products[0], wide, weight, gy)
    if bias in halves and function.inputs[bias].shape == gy.shape[1:2]:
        sums[bias] = float32_total(gy, (0, *range(2, gy.ndim)))
    found = {}
    for index, total in sums.items():
        amax = amax_of(total)
        if math.isfinite(amax):
            computed = function.inputs[index].creator_node is not None
            found[index] = _rounded(total, exponent, amax, HEADROOM + backoff if computed else _LEAF_HEADROOM)
    return found


def gradients_in_range(
    function: Any, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int
) -> tuple[tuple[Any, ...], int]:
    """`backward_arrays`, computed again from lower gys where a sum overflows or what a loss was computed from
    has a gradient that does, and the exponent of the result.

    That of a multiplication by a constant takes over the constant's power of two.
    gys: arrays or None, which carry `exponent`.
    """
    if not targets:
        return (), exponent
    constant = constant_of(function)
    if constant is not None and gys[0] is not None:
        gx, exponent = gradient_by_constant(constant, gys[0], exponent)
        return (gx,), exponent
    gxs = backward_arrays(function, targets, gys)
    present = [gy for gy in gys if gy is not None]
    size = max((gy.size for gy in present), default=0)
    sums = [place for place, index in enumerate(targets) if _may_be_larger(function.inputs[index], size)]
    if not sums or not all(library_of(gy).on_host for gy in present):
        return gxs, exponent
    for _ in range(_RETREATS):
        if all_finite([gxs[place] for place in sums if gxs[place] is not None]) or not all_finite(present):
            break
        present = [shifted(gy, -_RETREAT) for gy in present]
        exponent -= _RETREAT
        remaining = iter(present)
        gxs = backward_arrays(function, targets, tuple(gy if gy is None else next(remaining) for gy in gys))
    return gxs, exponent


def _may_be_larger(node: Any, size: int) -> bool:
    """Whether the gradient of a float16 node may be much larger than those of at most `size` elements that it
    is computed from: where it adds them up, or is that of what a loss was computed from."""
    if node.dtype != np.float16:
        return False
    return size == 1 or math.prod(node.shape) < size or node.creator_node is None


def _rounded(total: Any, exponent: int, amax: float, headroom: int) -> ScaledGradient:
    """A gradient that carries `exponent`, rounded to float16 with its largest element, `amax`, so many powers
    of two below the format's maximum."""
    shift = floor_log2(FLOAT16.max / amax) - headroom if amax else 0
    return ScaledGradient(shifted(total, shift, np.float16, reuse=True), exponent + shift)
