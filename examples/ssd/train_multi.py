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
from ada_loss.report.facts import load
from ada_loss.report.table import wrapped
from arguments import Settings, parse_settings
from cautions import cautions
from errors import DIVERGED, InputError, caution, ends_cleanly
from options import training_parser
from output import reserved
from ranks import Alone, choose_communicator, choose_device, start_ranks
from reporting import find_summary_writer
from threads import use_half_of_the_cores
from training import assemble, records_gradients, summary


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(argv)
    use_half_of_the_cores()
    ranks = start_ranks()
    with ranks.ending_together():
        device, communicator = ranks.together(lambda: _look_at_machine(settings, ranks))
        ranks = ranks.connected(communicator)
        dtype = chainer.mixed16 if settings.dtype == "mixed16" else np.dtype(settings.dtype)
        with (
            chainer.using_config("dtype", dtype),
            kernels.using(settings.kernels),
            reserved(settings, ranks),
        ):
            run = assemble(settings, ranks, device)
            # Behind all that may be refused.
            for sentence in cautions(settings, training_parser().given(argv)):
                caution(sentence)
            result = run.train()
    if ranks.rank == 0:
        print(result["message"] or "", end="\n" if result["message"] else "")
        if records_gradients(settings):
            print(*map(wrapped, load([settings.out])[0].summary()), sep="\n")
        print(summary(result, settings.out))
    return DIVERGED if result["outcome"] == "diverged" else 0


def _look_at_machine(settings: Settings, ranks: Alone) -> tuple[int | None, str]:
    """The number of the GPU to use, if any, and which communicator. Raises InputError if this machine can't
    do as told."""
    if settings.batchsize % ranks.size:
        raise InputError(
            f"--batchsize {settings.batchsize} does not divide among {ranks.size} ranks: use a multiple."
        )
    try:
        provider(settings.kernels)
    except ImportError as error:
        raise InputError(str(error)) from None
    if settings.tensorboard:
        find_summary_writer()
    device = choose_device(settings.device, ranks)
    return device, choose_communicator(settings.communicator, on_gpu=device is not None)


if __name__ == "__main__":
    sys.exit(main())
