"""NumPy arrays that ada_loss takes for those of a GPU, so that its ways for GPUs run where there is none.

What differs from a real one: Chainer itself, and PyTorch, go on computing on the host. The CUDA kernels,
which `test_device_statistics` runs, are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ada_loss.arrays import device_statistics

LOOKS = ("largest_magnitude", "all_finite")
"""The functions of `ada_loss.arrays.statistics` that wait for a GPU, besides `fetch`."""


class PretendedGpu(ModuleType):
    """Stands for the module cupy.

    transfers: how often figures were fetched from the device. looks: how often single arrays were looked at,
    each of which makes a GPU wait.
    """

    def __init__(self) -> None:
        super().__init__("pretended_gpu")
        self.transfers = 0
        self.looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def concatenate(self, vectors: list[Any]) -> Any:
        self.transfers += 1
        return np.concatenate(vectors)


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Let ada_loss take every array for one of a GPU."""
    gpu = PretendedGpu()
    monkeypatch.setattr(device_statistics, "figures", figures)
    _replace(monkeypatch, "module_of", lambda _: lambda array: gpu)
    for look in LOOKS:
        _replace(monkeypatch, look, lambda plain: _noted(gpu, plain))
    return gpu


def figures(xp: Any, array: Any, logs: bool) -> Any:
    """What `device_statistics.figures` describes."""
    magnitudes = np.abs(np.asarray(array, np.float64)).ravel()
    nonzero = magnitudes[magnitudes > 0]
    logarithms = np.log(nonzero) if logs else np.zeros(1)
    largest = magnitudes.max() if np.isfinite(magnitudes).all() else np.inf
    sums = (logarithms.sum(), (logarithms**2).sum())
    return np.array([nonzero.size, (nonzero**2).sum(), largest, nonzero.min(initial=np.inf), *sums])


def _replace(monkeypatch: pytest.MonkeyPatch, name: str, made: Callable[[Any], Any]) -> None:
    """Put another function in place of one of `ada_loss.arrays.statistics`, wherever it was imported."""
    plain = getattr(sys.modules["ada_loss.arrays.statistics"], name)
    other = made(plain)
    for module in [module for path, module in sys.modules.items() if path.startswith("ada_loss")]:
        if getattr(module, name, None) is plain:
            monkeypatch.setattr(module, name, other)


def _noted(gpu: PretendedGpu, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def look(arrays: Any) -> Any:
        gpu.looks += 1
        return plain(arrays)

    return look
