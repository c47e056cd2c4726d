"""How many threads a program computes with, unless it is told."""

from __future__ import annotations

import os
import sys

from threadpoolctl import threadpool_limits

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def use_half_of_the_cores() -> None:
    """Compute with half of the cores from now on, unless the environment says with how many threads.

    Threads that wait for each other wait several times as long where another program takes a core from one of
    them, while on an idle machine all cores are only a little faster than half of them.
    """
    if any(name in os.environ for name in VARIABLES):
        return
    count = max(1, usable_cores() // 2)
    # What is loaded is told, what is not loaded yet will read the environment.
    os.environ.update(dict.fromkeys(VARIABLES, str(count)))
    threadpool_limits(count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
