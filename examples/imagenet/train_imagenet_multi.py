#!/usr/bin/env python3
"""Trains ResNet-18 or -50 on ImageNet, alone or behind mpiexec -n N; see README.md and --help."""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import chainer
import chainer.links as L
from chainer.optimizer_hooks import WeightDecay
from chainer.optimizers import CorrectedMomentumSGD
from chainercv.links import ResNet50
from chainercv.links.model.resnet.resblock import Bottleneck

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from batches import BatchIterator, Schedule
from classification import TrainChain, accuracy
from command_line import count, count_or_zero, positive, share
from command_options import (
    DTYPES,
    add_run_options,
    add_scaling_options,
    example_parser,
    scaling_name,
    scaling_of,
    settings_of,
)
from errors import InputError, ends_cleanly
from imagenet_data import STAND_IN, ImageNetSamples, make_stand_in, open_imagenet
from resnets import resnet18
from sessions import Plan, started, train

ACCURACY = "validation/main/accuracy"
STEPS = (30, 60, 80)
# Goyal et al. 2017: rates above this one are reached from it, in so many epochs.
PLAIN_RATE, PLAIN_BATCH, WARM_UP_EPOCHS = 0.1, 256, 5


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    scaling, dtype = scaling_of(options), DTYPES[options.dtype]
    with started(options, dtype) as machine:
        ranks = machine.ranks

        # Data; --batchsize is that of each rank.
        folder = ranks.rank_0_first(lambda: find_data(options))
        train_set, val_set, n_class = ranks.together(lambda: open_imagenet(folder))
        samples = ImageNetSamples(train_set, options.size, chainer.get_dtype(), machine.seed)
        val_samples = ImageNetSamples(val_set, options.size, chainer.get_dtype())
        batchsize = options.batchsize * ranks.size
        schedule = Schedule(len(train_set), batchsize, machine.seed, ranks.rank, ranks.size)

        # Model and optimizer; the two numbered lines make their gradients adaptive.
        model = build_model(options.arch, n_class, options.first_bn_mixed16)
        if options.dtype != "float32":
            model = ada.AdaLossScaled(model, **scaling)  # 1
            if options.verbose and ranks.rank == 0:
                print(model.ada_loss.report)
        chain = TrainChain(model)
        chain.to_device(machine.device)
        optimizer = CorrectedMomentumSGD(momentum=options.momentum).setup(chain)
        for parameter in chain.params():
            if parameter.name not in ("beta", "gamma"):
                parameter.update_rule.add_hook(WeightDecay(options.weight_decay))
        optimizer = ranks.multi_node(optimizer)
        if options.dtype != "float32":
            ada.prepare(optimizer)  # 2

        # Training.
        base = options.lr or PLAIN_RATE * batchsize / PLAIN_BATCH

        def learning_rate(done: int) -> float:
            return rate_in_epoch(schedule.epochs(done), base, options.lr_decay)

        def evaluate() -> dict[str, float]:
            return {ACCURACY: accuracy(model, val_samples, len(val_set), options.batchsize, ranks)}

        an_epoch = math.ceil(len(train_set) / batchsize)
        plan = Plan(
            iterations=options.iter or math.ceil(options.epoch * len(train_set) / batchsize),
            scaling=scaling_name(options),
            learning_rate=learning_rate,
            evaluate=evaluate,
            best=ACCURACY,
            evaluated=an_epoch,
            logged=max(1, an_epoch // 10),
            saved=options.snapshot_freq * (1 if options.iter else an_epoch),
            settings=settings_of(options),
        )
        iterator = BatchIterator(samples, schedule, options.loaderjob)
        return train(plan, iterator, optimizer, model, machine, options)


def find_data(options: argparse.Namespace) -> Path:
    if options.dataset == "digits":
        return make_stand_in(options.dataset_dir or STAND_IN)
    if options.dataset_dir is None:
        raise InputError("--dataset imagenet needs --dataset-dir, the folder with train and val.")
    return options.dataset_dir


def build_model(arch: str, n_class: int, first_bn_mixed16: bool) -> chainer.Link:
    """A ResNet whose residual branches of bottlenecks begin as zeros."""
    if arch == "resnet18":
        model = resnet18(n_class)
        first = model.stem[0]
    else:
        model = ResNet50(n_class=n_class)
        model.pick = "fc6"
        first = model.conv1
        for link in model.links():
            if isinstance(link, Bottleneck):
                link.conv3.bn.gamma.array[...] = 0
    if first_bn_mixed16:
        with first.init_scope():
            first.bn = L.BatchNormalization(64, dtype=chainer.mixed16)
    return model


def rate_in_epoch(epoch: float, base: float, decay: float) -> float:
    """The learning rate: from PLAIN_RATE to a higher `base` at first, times `decay` at each of STEPS."""
    if epoch < WARM_UP_EPOCHS and base > PLAIN_RATE:
        return PLAIN_RATE + (base - PLAIN_RATE) * epoch / WARM_UP_EPOCHS
    return base * decay ** sum(epoch >= step for step in STEPS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = example_parser(__doc__)
    add = parser.add_argument_group("model, data and training").add_argument
    add("--arch", "-a", choices=("resnet18", "resnet50"), default="resnet50", help="the network")
    add("--dataset", choices=("imagenet", "digits"), default="imagenet", help="digits make themselves")
    add(
        "--dataset-dir",
        type=Path,
        help="folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG; digits are made there",
    )
    add("--size", type=count, default=224, help="side of the images that the network sees")
    add("--loaderjob", type=count_or_zero, default=4, help="processes that read images, for each rank")
    add("--batchsize", type=count, default=32, help="images for each rank")
    add("--epoch", type=count, default=90, help=f"how many; rates fall after {STEPS}")
    add("--iter", type=count, help="how many iterations, in place of --epoch")
    add("--lr", type=positive, help="learning rate; without it 0.1 for 256 images of all ranks")
    add("--lr-decay", type=positive, default=0.1, help="what the learning rate is multiplied by")
    add("--momentum", type=share, default=0.9, help="of SGD")
    add("--weight-decay", type=share, default=1e-4, help="of all but batch normalization's parameters")
    add(
        "--snapshot-freq",
        type=count,
        default=1,
        help="checkpoint every so many epochs (with --iter, iterations)",
    )
    add(
        "--first-bn-mixed16",
        action="store_true",
        help="first batch normalization in float32 with --dtype float16",
    )
    add("--verbose", action="store_true", help="say which layers get scales of their own")
    add_scaling_options(parser, dtype="float32", loss_scale_method="abs_range")
    add_run_options(parser, out="results", seed=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
