"""Image classification: the accuracy on a data set, divided among the ranks."""

from __future__ import annotations

from typing import Any

import chainer
import chainer.functions as F
import numpy as np

from ranks import Alone


class TrainChain(chainer.Chain):
    """A classifier and its loss; reports the loss and the accuracy of a batch."""

    def __init__(self, model: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            self.model = model

    def forward(self, x: Any, labels: Any) -> chainer.Variable:
        scores = F.cast(self.model(x), np.float32)
        loss = F.softmax_cross_entropy(scores, labels)
        chainer.report({"loss": loss, "accuracy": F.accuracy(scores, labels)}, self)
        return loss


def accuracy(model: chainer.Link, samples: Any, n_samples: int, batchsize: int, ranks: Alone) -> float:
    """The share of samples that a classifier gets right, on every rank; each rank looks at a part of them."""
    indices = range(ranks.rank, n_samples, ranks.size)
    right = 0
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for first in range(0, len(indices), batchsize):
            batch = [samples.sample(0, index) for index in indices[first : first + batchsize]]
            images, labels = chainer.dataset.concat_examples(batch, model.device)
            right += int((model(images).array.argmax(axis=1) == labels).sum())
    return sum(ranks.all_gather(right)) / n_samples
