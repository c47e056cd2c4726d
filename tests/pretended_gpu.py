"""NumPy arrays that ada_loss takes for those of a GPU, so that its ways for GPUs run where there is none.

What differs from a real one: Chainer itself, and PyTorch, go on computing on the host. The CUDA kernels,
which `test_device_statistics` runs, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ada_loss.arrays import casting, device_statistics, library
from ada_loss.arrays.on_cupy import CuPy


class PretendedModule(ModuleType):
    """Stands for the module cupy."""

    def __init__(self) -> None:
        super().__init__("pretended_gpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class PretendedGpu(CuPy):
    """The library of CuPy's arrays, on NumPy's.

    transfers: how often figures were fetched from the device. looks: how often arrays were looked at, each of
    which makes a GPU wait.
    """

    def __init__(self) -> None:
        super().__init__(PretendedModule())
        self.transfers = self.looks = 0

    def cast(self, array: Any, dtype: Any) -> Any:
        return casting.cast(array, dtype)

    def all_finite(self, arrays: Sequence[Any]) -> bool:
        self.looks += 1
        return super().all_finite(arrays)

    def _transfer(self, vectors: Sequence[Any]) -> list[float]:
        self.transfers += 1
        return super()._transfer(vectors)


def pretend(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Let ada_loss take every array for one of a GPU."""
    gpu = PretendedGpu()
    monkeypatch.setattr(device_statistics, "figures", figures)
    monkeypatch.setattr(library, "_library_of_class", lambda cls: gpu)
    return gpu


def figures(xp: Any, array: Any, logs: bool) -> Any:
    """What `device_statistics.figures` describes."""
    magnitudes = np.abs(np.asarray(array, np.float64)).ravel()
    nonzero = magnitudes[magnitudes > 0]
    logarithms = np.log(nonzero) if logs else np.zeros(1)
    largest = magnitudes.max() if np.isfinite(magnitudes).all() else np.inf
    sums = (logarithms.sum(), (logarithms**2).sum())
    return np.array([nonzero.size, (nonzero**2).sum(), largest, nonzero.min(initial=np.inf), *sums])
