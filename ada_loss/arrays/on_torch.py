"""PyTorch: an array is summarized in float64 where it lies; nothing waits for a device before `fetch`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from ada_loss.core.deferred import Deferred, Figures, OnDevice, Ready
from ada_loss.core.measurement import EMPTY, UNUSABLE, Statistics


class PyTorch:
    """A `Library` of tensors of any floating type, on any device, dense and without a graph."""

    module = torch

    on_host = False

    def cast(self, array: Any, dtype: Any) -> Any:
        return array.to(dtype)

    def summarize(self, array: Any, *, amin: bool = False, logs: bool = False) -> Deferred[Statistics]:
        if not array.numel():
            return Ready(EMPTY)
        magnitudes = array.detach().to(torch.float64).abs()
        present = magnitudes > 0
        figures = [present.sum(), magnitudes.square().sum(), magnitudes.amax()]
        if amin:
            figures.append(torch.where(present, magnitudes, math.inf).amin())
        if logs:
            logarithms = torch.where(present, magnitudes, 1.0).log()
            figures += [logarithms.sum(), logarithms.square().sum()]
        return _deferred(partial(_statistics, array.numel(), amin, logs), figures)

    def amax(self, array: Any) -> Deferred[float]:
        if not array.numel():
            return Ready(0.0)
        return _deferred(itemgetter(0), [array.detach().abs().amax()])

    def product_extremes(self, gy_rows: Any, weight_rows: Any) -> Deferred[tuple[float, float]]:
        if not gy_rows.numel() or not weight_rows.numel():
            return Ready((0.0, 0.0))
        lows, highs = zip(*map(_extremes_by_row, (gy_rows, weight_rows)), strict=True)
        high = (highs[0] * highs[1]).amax()
        # A row without a nonzero element has an infinite smallest one.
        return _deferred(_pair, [(lows[0] * lows[1]).amin(), high])

    def all_finite(self, arrays: Sequence[Any]) -> bool:
        by_device: dict[Any, list[Any]] = {}
        for array in arrays:
            by_device.setdefault(array.device, []).append(torch.isfinite(array).all())
        return all(bool(torch.stack(flags).all()) for flags in by_device.values())


def library() -> PyTorch:
    """PyTorch, which some tensor belongs to, and so is there."""
    return PyTorch()


def _deferred(build: Any, figures: list[Any]) -> Any:
    vector = torch.stack([figure.to(torch.float64) for figure in figures])
    return OnDevice((Figures(vector, len(figures), _transfer),), build)


def _transfer(vectors: Sequence[Any]) -> list[float]:
    """One transfer from each device, in the order of the vectors."""
    by_device: dict[Any, list[Any]] = {}
    for vector in vectors:
        by_device.setdefault(vector.device, []).append(vector)
    arrived = {device: iter(torch.cat(some).tolist()) for device, some in by_device.items()}
    return [next(arrived[vector.device]) for vector in vectors for _ in range(len(vector))]


def _statistics(size: int, amin: bool, logs: bool, figures: list[float]) -> Statistics:
    nonzero, sum_squares, amax, *others = figures
    if not math.isfinite(amax):
        return UNUSABLE
    low = others.pop(0) if amin else 0.0
    sum_logs, sum_squared_logs = others if logs else (0.0, 0.0)
    low = low if nonzero else 0.0
    return Statistics(size, int(nonzero), sum_squares, amax, low, True, sum_logs, sum_squared_logs)


def _extremes_by_row(matrix: Any) -> tuple[Any, Any]:
    magnitudes = matrix.detach().to(torch.float64).abs()
    return torch.where(magnitudes > 0, magnitudes, math.inf).amin(dim=1), magnitudes.amax(dim=1)


def _pair(figures: list[float]) -> tuple[float, float]:
    low, high = figures
    return (low if high else 0.0), high
