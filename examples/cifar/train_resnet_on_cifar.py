#!/usr/bin/env python3
"""Trains ResNet-20 to -110 on CIFAR-10 or -100 with a choice of loss scaling; see README.md and --help."""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import chainer
from chainer.optimizer_hooks import WeightDecay
from chainer.optimizers import MomentumSGD

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from batches import BatchIterator, Schedule
from cifar_data import CifarSamples, LabelledImages, draw_stand_in, read_cifar
from classification import TrainChain, accuracy
from command_line import count, positive
from command_options import (
    DTYPES,
    add_run_options,
    add_scaling_options,
    example_parser,
    scaling_name,
    scaling_of,
    settings_of,
)
from errors import SharedInputError, ends_cleanly
from resnets import cifar_resnet
from sessions import Plan, started, train

ACCURACY = "validation/main/accuracy"
STEPS, DROP = (81, 122), 0.1
WEIGHT_DECAY = 1e-4
# Networks of 110 layers and more begin with a tenth of the learning rate.
DEEP, WARM_UP_EPOCHS, WARM_UP_START = 110, 5, 0.1


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    scaling, dtype = scaling_of(options), DTYPES[options.dtype]
    with started(options, dtype) as machine:
        ranks = machine.ranks
        if options.train_batch % ranks.size:
            raise SharedInputError(
                f"--train_batch {options.train_batch} does not divide among {ranks.size} ranks: change it."
            )

        # Data.
        train_set, test_set = ranks.together(lambda: open_data(options))
        samples = CifarSamples(train_set, options.n_class, chainer.get_dtype(), machine.seed)
        test_samples = CifarSamples(test_set, options.n_class, chainer.get_dtype())
        n_train, n_test = len(train_set.labels), len(test_set.labels)
        schedule = Schedule(n_train, options.train_batch, machine.seed, ranks.rank, ranks.size)

        # Model and optimizer; the two numbered lines make their gradients adaptive.
        model = cifar_resnet(options.n_layer, options.n_class)
        if options.dtype != "float32":
            model = ada.AdaLossScaled(model, **scaling)  # 1
        chain = TrainChain(model)
        chain.to_device(machine.device)
        optimizer = MomentumSGD().setup(chain)
        optimizer.add_hook(WeightDecay(WEIGHT_DECAY))
        optimizer = ranks.multi_node(optimizer)
        if options.dtype != "float32":
            ada.prepare(optimizer)  # 2

        # Training.
        def learning_rate(done: int) -> float:
            return rate_in_epoch(schedule.epochs(done), options.lr, options.n_layer)

        def evaluate() -> dict[str, float]:
            return {ACCURACY: accuracy(model, test_samples, n_test, options.train_batch, ranks)}

        an_epoch = math.ceil(n_train / options.train_batch)
        plan = Plan(
            iterations=math.ceil(options.epoch * n_train / options.train_batch),
            scaling=scaling_name(options),
            learning_rate=learning_rate,
            evaluate=evaluate,
            best=ACCURACY,
            evaluated=an_epoch,
            logged=min(an_epoch, 100),
            saved=an_epoch,
            settings=settings_of(options),
        )
        return train(plan, BatchIterator(samples, schedule), optimizer, model, machine, options)


def open_data(options: argparse.Namespace) -> tuple[LabelledImages, LabelledImages]:
    if options.dataset == "digits":
        return draw_stand_in(options.n_class)
    return read_cifar(options.data_dir, options.n_class)


def rate_in_epoch(epoch: float, base: float, n_layer: int) -> float:
    """The learning rate: a tenth at first for deep networks, a tenth and a hundredth after STEPS epochs."""
    rate = base * DROP ** sum(epoch >= step for step in STEPS)
    return rate * WARM_UP_START if n_layer >= DEEP and epoch < WARM_UP_EPOCHS else rate


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = example_parser(__doc__)
    add = parser.add_argument_group("model, data and training").add_argument
    add("--n_layer", "--n-layer", type=int, choices=(20, 32, 44, 56, 110), default=20, help="of the ResNet")
    add("--n_class", "--n-class", type=int, choices=(10, 100), default=10, help="CIFAR-10 or CIFAR-100")
    add("--dataset", choices=("cifar", "digits"), default="cifar", help="digits draw themselves, in seconds")
    add("--data-dir", type=Path, default=Path("data"), help="folder with CIFAR's python version")
    add("--train_batch", "--train-batch", type=count, default=128, help="images, over all ranks")
    add("--epoch", type=positive, default=164, help="how many epochs")
    add("--lr", type=positive, default=0.1, help=f"learning rate; a tenth after {STEPS} epochs")
    # The bounds of the paper's experiments on CIFAR.
    add_scaling_options(
        parser,
        dtype="mixed16",
        loss_scale_method="approx_range",
        scale_upper_bound=128.0,
        accum_upper_bound=4096.0,
    )
    add_run_options(parser, out="result", seed=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
