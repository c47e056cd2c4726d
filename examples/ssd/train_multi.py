#!/usr/bin/env python3
"""Trains SSD with a choice of loss scaling, alone or behind mpiexec -n N; see README.md and --help."""

from __future__ import annotations

import ada_loss.chainer  # noqa: F401  isort: skip  (has to come before Chainer)

import sys
from collections.abc import Sequence

import chainer
import numpy as np

from ada_loss.chainer import kernels
from ada_loss.chainer.kernels.providers import provider
from arguments import Settings, parse_settings
from errors import InputError, SharedInputError, ends_cleanly
from ranks import gpu_is_there, start_ranks
from training import assemble, summary


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv)
    _check_kernels(settings.kernels)
    on_gpu = _choose_gpu(settings)
    ranks = start_ranks(settings.communicator, on_gpu)
    if settings.batchsize % ranks.size:
        raise SharedInputError(
            f"--batchsize {settings.batchsize} does not divide among {ranks.size} ranks: use a multiple."
        )
    dtype = chainer.mixed16 if settings.dtype == "mixed16" else np.dtype(settings.dtype)
    with chainer.using_config("dtype", dtype), kernels.using(settings.kernels):
        run = assemble(settings, ranks, on_gpu)
        try:
            result = run.train()
        except BaseException as error:
            ranks.fail(error)
    if ranks.rank == 0:
        print(result["message"] or "", end="\n" if result["message"] else "")
        print(summary(result, settings.out))
    return 0


def _choose_gpu(settings: Settings) -> bool:
    if settings.device == "gpu" and not gpu_is_there():
        raise InputError("--device gpu needs a GPU and CuPy, and there is none: use --device cpu.")
    return settings.device != "cpu" and gpu_is_there()


def _check_kernels(name: str) -> None:
    try:
        provider(name)
    except ImportError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
