"""ChainerCV's SegNet for float16, and how well it tells the classes of pixels."""

from __future__ import annotations

from typing import Any

import chainer
import chainer.functions as F
import numpy as np
from chainercv.evaluations import calc_semantic_segmentation_iou
from chainercv.links import SegNetBasic

from ranks import Alone


class SegNet(SegNetBasic):
    """SegNetBasic with its weights' names, which normalizes its input in float32.

    The squares of pixels of 0 to 255, added up over the channels, are more than float16 holds.
    """

    def forward(self, x: Any) -> chainer.Variable:
        h = F.local_response_normalization(x, 5, 1, 1e-4 / 5, 0.75)
        h = F.cast(h, chainer.get_dtype())
        indices = []
        for level in (1, 2, 3, 4):
            convolution, normalization = self[f"conv{level}"], self[f"conv{level}_bn"]
            h = F.relu(normalization(convolution(h)))
            h, maxima = F.max_pooling_2d(h, 2, 2, return_indices=True)
            indices.append(maxima)
        for level in (4, 3, 2, 1):
            h = self._upsampling_2d(h, indices.pop())
            h = self[f"conv_decode{level}_bn"](self[f"conv_decode{level}"](h))
        return self.conv_classifier(h)


def figures(model: SegNet, samples: Any, n_samples: int, n_class: int, ranks: Alone) -> dict[str, float]:
    """Mean IoU, mean accuracy of the classes and accuracy of the pixels, on every rank.

    Each rank looks at a part of the images. Classes that are nowhere are left out.
    """
    confusion = np.zeros((n_class, n_class), np.int64)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        for index in range(ranks.rank, n_samples, ranks.size):
            image, label = samples.sample(0, index)
            scores = model(model.xp.asarray(image[None]))
            found = chainer.get_device("@numpy").send(scores.array)[0].argmax(axis=0)
            known = label >= 0
            pairs = n_class * label[known] + found[known]
            confusion += np.bincount(pairs, minlength=n_class**2).reshape(n_class, n_class)
    confusion = sum(ranks.all_gather(confusion))
    right, present = np.diag(confusion), confusion.sum(axis=1)
    # Classes that are nowhere are 0 / 0.
    with np.errstate(invalid="ignore"):
        overlaps = calc_semantic_segmentation_iou(confusion)
    return {
        "validation/main/miou": float(np.nanmean(overlaps)),
        "validation/main/mean_class_accuracy": float((right[present > 0] / present[present > 0]).mean()),
        "validation/main/pixel_accuracy": float(right.sum() / max(present.sum(), 1)),
    }
