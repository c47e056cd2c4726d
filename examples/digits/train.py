#!/usr/bin/env python3
"""Classifies handwritten digits in mixed precision, with a loss scale that every layer finds for itself."""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.datasets import TupleDataset, split_dataset_random
from chainer.iterators import SerialIterator
from chainer.training import extensions

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from command_line import count
from command_options import DTYPES, example_parser
from digit_images import load_sources
from errors import ends_cleanly
from threads import use_half_of_the_cores

BATCH_SIZE, SEED = 32, 0
ACCURACY = "validation/main/accuracy"


class Net(chainer.Chain):
    """Two convolutions and two linear layers for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(1, 16, 3, pad=1)
            self.conv2 = L.Convolution2D(16, 32, 3, pad=1)
            self.fc1 = L.Linear(32 * 4 * 4, 64)
            self.fc2 = L.Linear(64, 10)

    def forward(self, x: Any) -> chainer.Variable:
        h = F.relu(self.conv1(x))
        h = F.max_pooling_2d(F.relu(self.conv2(h)), 2)
        return self.fc2(F.relu(self.fc1(h)))


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = example_parser(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="mixed16", help="precision of the network")
    parser.add_argument("--epoch", type=count, default=10, help="how many epochs")
    parser.add_argument("--out", default="result", help="folder for the log")
    options = parser.parse_args(argv)
    use_half_of_the_cores()

    # From here on layers are made, and images cast, in this precision.
    chainer.global_config.dtype = DTYPES[options.dtype]
    np.random.seed(SEED)
    train, test = open_digits()

    model = Net()
    model = ada.AdaLossScaled(model)  # line 1
    classifier = L.Classifier(model)
    optimizer = chainer.optimizers.MomentumSGD(lr=0.02)
    optimizer.setup(classifier)
    ada.prepare(optimizer)  # line 2

    # Everything else is as in any training with Chainer.
    updater = training.StandardUpdater(SerialIterator(train, BATCH_SIZE), optimizer)
    trainer = training.Trainer(updater, (options.epoch, "epoch"), out=options.out)
    test_iterator = SerialIterator(test, BATCH_SIZE, repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(test_iterator, classifier))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(["epoch", "main/loss", "main/accuracy", ACCURACY]))
    trainer.run()

    accuracy = trainer.get_extension("LogReport").log[-1][ACCURACY]
    print(f"accuracy {accuracy:.3f} on test images, {optimizer.entry_scale.skipped} steps skipped")
    print(model.ada_loss.report)
    return 0


def open_digits() -> tuple[Any, Any]:
    """scikit-learn's handwritten digits, for training and for testing."""
    scans, labels, _ = load_sources()
    images = scans[:, None].astype(chainer.get_dtype())
    return split_dataset_random(TupleDataset(images, labels.astype(np.int32)), 1400, seed=SEED)


if __name__ == "__main__":
    sys.exit(main())
