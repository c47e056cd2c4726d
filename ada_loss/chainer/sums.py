"""Gradients that add up many elements of gy, over a batch or over positions: those of parameters above all.

What gy's size says of a layer's input gradient it does not say of these: they can be larger by thousands.
Rules that promise never to overflow (`AdaLossConfig.scales_sums`) therefore give them exponents of their own.
On a GPU, where looking at a sum would mean to wait for it, they share the exponent of gy as under the paper's
rules, and a step in which one overflows is skipped.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ada_loss.chainer.decisions import backward_arrays, backward_with_weight, products_of
from ada_loss.chainer.gradient import InFlight, shifted
from ada_loss.chainer.kernels.elementwise import float32_total
from ada_loss.formats import FLOAT16
from ada_loss.rules import floor_log2
from ada_loss.statistics import all_finite, largest_magnitude, module_of

_RETREAT, _RETREATS = 4, 6
"""By how many powers of two gy is lowered when a sum of it overflows, and how often at most."""


def parameter_gradients(
    function: Any, targets: tuple[int, ...], gy: Any, exponent: int
) -> dict[int, InFlight]:
    """Gradients of a layer's float16 weight and bias, by input, each at the largest scale that it can have.

    They are added up in float32, as the kernels do anyway, and rounded once the largest element is known.
    gy: the layer's output gradient, an array that carries `exponent`.
    """
    products = products_of(function)
    if gy.dtype != np.float16 or module_of(gy) is not np or len(products) != 1:
        return {}
    weight, bias = products[0].weight, 2
    halves = [index for index in targets if function.inputs[index].dtype == np.float16]
    sums = {}
    if weight in halves:
        # Chainer gives the gradient the dtype of the weight, whose values do not matter here.
        wide = np.broadcast_to(np.float32(0), function.inputs[weight].shape)
        sums[weight] = backward_with_weight(function, products[0], wide, weight, gy)
    if bias in halves and function.inputs[bias].shape == gy.shape[1:2]:
        sums[bias] = float32_total(gy, (0, *range(2, gy.ndim)))
    return {index: _rounded(total, exponent) for index, total in sums.items() if total.dtype == np.float32}


def gradients_in_range(
    function: Any, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int
) -> tuple[tuple[Any, ...], int]:
    """`backward_arrays`, computed again from lower gys where a sum overflows, and the exponent of the result.

    gys: arrays or None, which carry `exponent`.
    """
    gxs = backward_arrays(function, targets, gys)
    present = [gy for gy in gys if gy is not None]
    if not all(module_of(gy) is np for gy in present):
        return gxs, exponent
    size = max((gy.size for gy in present), default=0)
    sums = [place for place, index in enumerate(targets) if _adds_up(function.inputs[index], size)]
    for _ in range(_RETREATS):
        if all_finite([gxs[place] for place in sums if gxs[place] is not None]) or not all_finite(present):
            break
        present = [shifted(gy, -_RETREAT) for gy in present]
        exponent -= _RETREAT
        remaining = iter(present)
        gxs = backward_arrays(function, targets, tuple(gy if gy is None else next(remaining) for gy in gys))
    return gxs, exponent


def _adds_up(node: Any, size: int) -> bool:
    """Whether the gradient of a float16 node may add up elements of gradients of at most `size` elements."""
    if node.dtype != np.float16:
        return False
    return math.prod(node.shape) < size or node.creator_node is None


def _rounded(total: Any, exponent: int) -> InFlight:
    """A float32 gradient that carries `exponent`, rounded to float16 with its largest element below half of
    the format's maximum, so that there is room for whatever it is added to."""
    peak = largest_magnitude(total)
    shift = floor_log2(FLOAT16.max / peak) - 1 if 0 < peak < math.inf else 0
    return InFlight(shifted(total, shift, np.float16), exponent + shift)
