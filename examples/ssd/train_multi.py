#!/usr/bin/env python3
"""Trains SSD with a choice of loss scaling, alone or behind mpiexec -n N; see README.md and --help."""

from __future__ import annotations

import ada_loss.chainer  # noqa: F401  isort: skip  (has to come before Chainer)

import sys
from collections.abc import Sequence
from pathlib import Path

import chainer
import numpy as np

from ada_loss.chainer import kernels
from ada_loss.chainer.kernels.providers import provider

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from arguments import Settings, parse_settings
from errors import InputError, ends_cleanly
from output import reserved
from ranks import choose_communicator, gpu_is_there, start_ranks
from reporting import find_summary_writer
from training import assemble, summary


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv)
    ranks = start_ranks()
    with ranks.ending_together():
        on_gpu, communicator = ranks.together(lambda: _look_at_machine(settings, ranks.size))
        ranks = ranks.connected(communicator)
        dtype = chainer.mixed16 if settings.dtype == "mixed16" else np.dtype(settings.dtype)
        with (
            chainer.using_config("dtype", dtype),
            kernels.using(settings.kernels),
            reserved(settings, ranks),
        ):
            result = assemble(settings, ranks, on_gpu).train()
    if ranks.rank == 0:
        print(result["message"] or "", end="\n" if result["message"] else "")
        print(summary(result, settings.out))
    return 0


def _look_at_machine(settings: Settings, n_ranks: int) -> tuple[bool, str]:
    """Whether to use a GPU, and which communicator. Raises InputError if this machine can't do as told."""
    if settings.batchsize % n_ranks:
        raise InputError(
            f"--batchsize {settings.batchsize} does not divide among {n_ranks} ranks: use a multiple."
        )
    try:
        provider(settings.kernels)
    except ImportError as error:
        raise InputError(str(error)) from None
    if settings.tensorboard:
        find_summary_writer()
    on_gpu = settings.device != "cpu" and gpu_is_there()
    if settings.device == "gpu" and not on_gpu:
        raise InputError("--device gpu needs a GPU and CuPy, and there is none: use --device cpu.")
    return on_gpu, choose_communicator(settings.communicator, on_gpu)


if __name__ == "__main__":
    sys.exit(main())
