"""The machine that a benchmark runs on: its name, where arrays go, and what tells the time there."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ada_loss.chainer  # noqa: F401  isort: skip  (makes Chainer importable)

import chainer
import numpy as np
from chainer.backends import cuda
from side_by_side import Clock, HostClock

from ada_loss.chainer import kernels


@dataclass(frozen=True)
class Machine:
    """What runs the benchmark.

    name: of the processor or the GPU. versions: what else the figures depend on. device: Chainer's, for
    arrays.
    """

    name: str
    versions: str
    device: Any
    clock: Clock

    @property
    def line(self) -> str:
        """The machine in a line."""
        return f"{self.name}; {self.versions}"

    def place(self, model: chainer.Link) -> chainer.Link:
        """The model, moved to the device."""
        model.to_device(self.device)
        return model

    def send(self, batch: Any) -> Any:
        """A batch (a tuple of arrays) on the device."""
        return self.device.send(batch)


class DeviceClock:
    """Events on the GPU: a phase ends when the GPU has done what was asked of it."""

    def mark(self) -> Any:
        event = cuda.cupy.cuda.Event()
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return cuda.cupy.cuda.get_elapsed_time(start, end) / 1000


def this_machine() -> Machine:
    """The first GPU if CuPy finds one, else the processor."""
    versions = [f"Python {platform.python_version()}", f"NumPy {np.__version__}", *_torch_version()]
    if cuda.available and cuda.cupy.cuda.is_available():
        properties = cuda.cupy.cuda.runtime.getDeviceProperties(0)
        versions.append(f"CuPy {cuda.cupy.__version__}")
        device, clock = chainer.get_device("@cupy:0"), DeviceClock()
        device.use()
        return Machine(properties["name"].decode(), ", ".join(versions), device, clock)
    versions.insert(0, f"{os.environ.get('OMP_NUM_THREADS', available_cores())} threads")
    name = f"{available_cores()} cores of {processor()}"
    return Machine(name, ", ".join(versions), chainer.get_device("@numpy"), HostClock())


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _torch_version() -> list[str]:
    if kernels.current() != "torch":
        return []
    import torch

    return [f"PyTorch {torch.__version__}"]
