"""From images to boxes: preprocessing, network, decoding, suppression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import chainer
import numpy as np
from chainer.backends import cuda
from chainercv import transforms
from chainercv.links.model.ssd import SSD

from coding import BoxCoder
from models import input_dtype
from nms import suppress

DECODERS = ("per-class", "argmax")
NMS_THRESHOLD = 0.45
MOST_BOXES = 200
TEST_BATCHSIZE = 32
# So many candidates for each box that is wanted are nearly always enough.
SHORTLIST = 6
# For mean average precision every candidate counts; for the eye only the sure ones.
EVALUATION_THRESH = 0.01
DRAWING_THRESH = 0.6


class Boxes(NamedTuple):
    """Detections in an image: bbox float32 (R, 4), label int32 (R,), score float32 (R,), best first."""

    bbox: np.ndarray
    label: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Detector:
    """Detects objects with a trained SSD.

    Attributes:
        model: the network.
        score_thresh: boxes with a lower score are left out.
        decoder: "per-class" lets every class of a default box compete; "argmax" only its best class.
        nms_thresh: overlap from which on the less sure of two boxes of a class is left out.
        limit: the most boxes that are found in an image.
        batch_size: images that are detected in at a time.
    """

    model: SSD
    score_thresh: float = EVALUATION_THRESH
    decoder: str = "per-class"
    nms_thresh: float = NMS_THRESHOLD
    limit: int = MOST_BOXES
    batch_size: int = TEST_BATCHSIZE

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, not {self.decoder!r}.")

    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        """Boxes in images (3, H, W), RGB of 0 to 255, in their pixels."""
        side = self.model.insize
        mean = np.asarray(self.model.mean, dtype=np.float32)
        dtype = input_dtype(self.model)
        batch = np.stack(
            [transforms.resize(image.astype(np.float32), (side, side)) - mean for image in images]
        )
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            outputs = self.model(self.model.xp.asarray(batch.astype(dtype)))
        # ChainerCV's decoder takes exponentials in the dtype that it gets, and float16 overflows at 12.
        locs, logits = (cuda.to_cpu(output.array).astype(np.float32) for output in outputs)
        coder = BoxCoder.of(self.model.coder)
        found = (
            pick_boxes(coder.decode(loc), self._scores(prob), self.score_thresh, self.nms_thresh, self.limit)
            for loc, prob in zip(locs, softmax(logits), strict=True)
        )
        return [
            boxes._replace(bbox=transforms.resize_bbox(boxes.bbox, (side, side), image.shape[1:]))
            for boxes, image in zip(found, images, strict=True)
        ]

    def _scores(self, prob: np.ndarray) -> np.ndarray:
        scores = prob[:, 1:]
        if self.decoder == "argmax":
            scores = np.where(scores == scores.max(axis=1, keepdims=True), scores, 0)
        return scores


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    # NumPy's own maximum is slow on so short an axis.
    highest = reduce(np.maximum, np.moveaxis(logits, -1, 0))
    powers = np.exp(logits - highest[..., None])
    return powers / powers.sum(axis=-1, keepdims=True)


def pick_boxes(
    corners: np.ndarray,
    scores: np.ndarray,
    score_thresh: float,
    nms_thresh: float = NMS_THRESHOLD,
    limit: int = MOST_BOXES,
) -> Boxes:
    """The best boxes over all classes, none overlapping a better one of its class.

    Args:
        corners: (4, K): y_min, x_min, y_max, x_max.
        scores: float32 (K, classes without the background), not negative.
        score_thresh: boxes with a lower score are left out.
        nms_thresh: intersection over union from which on boxes overlap.
        limit: the most boxes that are left.
    """
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    most = SHORTLIST * limit
    if most < scores.size:
        higher = np.partition(scores, -most, axis=None)[-most]
        if higher > score_thresh:
            found = _pick(corners, scores, higher, nms_thresh, limit)
            if len(found.score) == limit:
                # All boxes that were left out come behind these.
                return found
    return _pick(corners, scores, score_thresh, nms_thresh, limit)


def _pick(
    corners: np.ndarray, scores: np.ndarray, score_thresh: float, nms_thresh: float, limit: int
) -> Boxes:
    places = np.flatnonzero(scores >= score_thresh)
    # Scores are in the order of their bits. To sort these together with the places is several times as fast
    # as a stable argsort, and resolves ties alike.
    bits = scores.ravel()[places].view(np.int32).astype(np.int64)
    places = np.sort((-bits << 32) + places) & (2**32 - 1)
    rows, labels = np.divmod(places, scores.shape[1])
    kept = suppress(corners, nms_thresh, rows, labels, limit)
    rows, labels = rows[kept], labels[kept]
    return Boxes(
        corners[:, rows].T.astype(np.float32),
        labels.astype(np.int32),
        scores[rows, labels].astype(np.float32),
    )


def detect_all(detector: Detector, images: Iterable[np.ndarray]) -> list[Boxes]:
    """Boxes in any number of images, a batch at a time."""
    found: list[Boxes] = []
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == detector.batch_size:
            found += detector.detect(batch)
            batch = []
    return found + (detector.detect(batch) if batch else [])
