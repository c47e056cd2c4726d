"""CuPy: a kernel reads an array once (`device_statistics`); nothing waits for the GPU before `fetch`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from ada_loss.arrays import device_statistics
from ada_loss.arrays.extremes import pair, product_extremes
from ada_loss.core.deferred import Deferred, Figures, OnDevice, Ready
from ada_loss.core.measurement import EMPTY, UNUSABLE, Statistics

_AMAX = 2
"""The place of the largest magnitude among the figures that a GPU computes."""


class CuPy:
    """A `Library` of arrays on a GPU.

    Args:
        module: CuPy, or what stands for it.
    """

    on_host = False

    def __init__(self, module: Any) -> None:
        self.module = module

    def cast(self, array: Any, dtype: Any) -> Any:
        return array.astype(dtype, copy=False)

    def summarize(self, array: Any, *, amin: bool = False, logs: bool = False) -> Deferred[Statistics]:
        if not array.size:
            return Ready(EMPTY)
        return self._deferred(partial(_statistics, array.size, amin), self._figures(array, logs))

    def amax(self, array: Any) -> Deferred[float]:
        if not array.size:
            return Ready(0.0)
        return self._deferred(itemgetter(_AMAX), self._figures(array, False))

    def product_extremes(self, gy_rows: Any, weight_rows: Any) -> Deferred[tuple[float, float]]:
        if not gy_rows.size or not weight_rows.size:
            return Ready((0.0, 0.0))
        return self._deferred(pair, product_extremes(self.module, gy_rows, weight_rows))

    def all_finite(self, arrays: Sequence[Any]) -> bool:
        present = [array for array in arrays if array.size]
        if not present:
            return True
        xp = self.module
        return bool(xp.stack([xp.isfinite(array).all() for array in present]).all())

    def _figures(self, array: Any, logs: bool) -> Any:
        return device_statistics.figures(self.module, array, logs)

    def _deferred(self, build: Any, vector: Any) -> Any:
        return OnDevice((Figures(vector, vector.size, self._transfer),), build)

    def _transfer(self, vectors: Sequence[Any]) -> list[float]:
        return self.module.concatenate(vectors).tolist()


def _statistics(size: int, amin: bool, figures: list[float]) -> Statistics:
    nonzero, sum_squares, amax, low, sum_logs, sum_squared_logs = figures
    if not math.isfinite(amax):
        return UNUSABLE
    low = low if amin and nonzero else 0.0
    return Statistics(size, int(nonzero), sum_squares, amax, low, True, sum_logs, sum_squared_logs)


def library() -> CuPy:
    """CuPy, which some array belongs to, and so is there."""
    import cupy

    return CuPy(cupy)
