#!/usr/bin/env python3
"""Trains SegNet on CamVid with a choice of loss scaling; calc_weight.py comes first; see README.md."""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from chainer.optimizer_hooks import WeightDecay
from chainer.optimizers import MomentumSGD
from chainercv.links import PixelwiseSoftmaxClassifier

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from batches import BatchIterator, Schedule
from camvid_data import N_CLASS, CamVidSamples, find_data, open_split
from command_line import count, count_or_zero, positive
from command_options import (
    DTYPES,
    add_run_options,
    add_scaling_options,
    example_parser,
    scaling_name,
    scaling_of,
    settings_of,
)
from errors import InputError, SharedInputError, ends_cleanly
from segnet import SegNet, figures
from sessions import Plan, started, train

MIOU = "validation/main/miou"
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
# The bounds of the paper's experiment: none but the format's.
NO_BOUND = 65504.0


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    scaling, dtype = scaling_of(options), DTYPES[options.dtype]
    with started(options, dtype) as machine:
        ranks = machine.ranks
        if options.batchsize % ranks.size:
            raise SharedInputError(
                f"--batchsize {options.batchsize} does not divide among {ranks.size} ranks: change it."
            )

        # Data.
        folder = ranks.rank_0_first(lambda: find_data(options.dataset, options.data_dir))
        train_set, val_set = ranks.rank_0_first(
            lambda: [open_split(folder, part) for part in ("train", "val")]
        )
        weights = ranks.together(lambda: load_weights(options.class_weight))
        samples, val_samples = CamVidSamples(train_set, machine.seed), CamVidSamples(val_set)
        schedule = Schedule(len(train_set), options.batchsize, machine.seed, ranks.rank, ranks.size)

        # Model and optimizer; the two numbered lines make their gradients adaptive.
        model = SegNet(n_class=N_CLASS)
        if options.dtype != "float32":
            model = ada.AdaLossScaled(model, **scaling)  # 1
        chain = PixelwiseSoftmaxClassifier(model, class_weight=weights)
        chain.to_device(machine.device)
        optimizer = MomentumSGD(momentum=MOMENTUM).setup(chain)
        optimizer.add_hook(WeightDecay(WEIGHT_DECAY))
        optimizer = ranks.multi_node(optimizer)
        if options.dtype != "float32":
            ada.prepare(optimizer)  # 2

        # Training.
        plan = Plan(
            iterations=options.iter,
            scaling=scaling_name(options),
            learning_rate=lambda done: options.lr,
            evaluate=lambda: figures(model, val_samples, len(val_set), N_CLASS, ranks),
            best=MIOU,
            evaluated=options.val_iter,
            logged=50,
            saved=options.val_iter,
            settings=settings_of(options),
        )
        iterator = BatchIterator(samples, schedule, options.loaderjob)
        return train(plan, iterator, optimizer, model, machine, options)


def load_weights(path: Path) -> np.ndarray:
    try:
        weights = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} can't be read ({error}): run calc_weight.py first.") from None
    if weights.shape != (N_CLASS,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(f"{path} does not hold {N_CLASS} weights: run calc_weight.py again.")
    return weights.astype(np.float32)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = example_parser(__doc__)
    add = parser.add_argument_group("data and training").add_argument
    add("--dataset", choices=("camvid", "digits"), default="camvid", help="digits make themselves")
    add("--data-dir", type=Path, help="folder with train.txt and val.txt; ChainerCV's, fetched if need be")
    add("--class-weight", type=Path, default=Path("class_weight.npy"), help="what calc_weight.py wrote")
    add("--batchsize", type=count, default=12, help="images, over all ranks")
    add("--iter", type=count, default=16000, help="how many iterations")
    add("--val-iter", type=count, default=2000, help="validate every so many iterations")
    add("--lr", type=positive, default=0.1, help="learning rate")
    add("--loaderjob", type=count_or_zero, default=0, help="processes that read images, for each rank")
    bounds = {"scale_upper_bound": NO_BOUND, "accum_upper_bound": NO_BOUND}
    rule = {"loss_scale_method": "approx_range", "update_per_n_iteration": 100, "n_uf": 1e-5}
    add_scaling_options(parser, dtype="float32", **rule, **bounds)
    add_run_options(parser, out="result", seed=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
