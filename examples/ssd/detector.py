"""From images to boxes: preprocessing, network, decoding, suppression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import chainer
import numpy as np
from chainer.backends import cuda
from chainercv import transforms
from chainercv.links.model.ssd import SSD, MultiboxCoder

from models import input_dtype
from nms import suppress

DECODERS = ("per-class", "argmax")
NMS_THRESH = 0.45
MOST_BOXES = 200
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
    """

    model: SSD
    score_thresh: float = EVALUATION_THRESH
    decoder: str = "per-class"

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
        return [
            self._decode(loc, softmax(logit), image.shape[1:])
            for loc, logit, image in zip(locs, logits, images, strict=True)
        ]

    def _decode(self, loc: np.ndarray, prob: np.ndarray, size: tuple[int, int]) -> Boxes:
        found = pick_boxes(decode_boxes(self.model.coder, loc), self._scores(prob), self.score_thresh)
        bbox = transforms.resize_bbox(found.bbox, (self.model.insize,) * 2, size)
        return found._replace(bbox=bbox)

    def _scores(self, prob: np.ndarray) -> np.ndarray:
        scores = prob[:, 1:]
        if self.decoder == "argmax":
            scores = np.where(scores == scores.max(axis=1, keepdims=True), scores, 0)
        return scores


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def decode_boxes(coder: MultiboxCoder, loc: np.ndarray) -> np.ndarray:
    """Offsets (K, 4) to boxes (K, 4) as (y_min, x_min, y_max, x_max); the inverse of the coder's `encode`."""
    default = cuda.to_cpu(coder._default_bbox)
    centre_variance, size_variance = coder._variance
    with np.errstate(over="ignore"):
        size = default[:, 2:] * np.exp(loc[:, 2:] * size_variance)
    centre = default[:, :2] + loc[:, :2] * centre_variance * default[:, 2:]
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1)


def pick_boxes(
    bbox: np.ndarray,
    scores: np.ndarray,
    score_thresh: float,
    nms_thresh: float = NMS_THRESH,
    limit: int = MOST_BOXES,
) -> Boxes:
    """The best boxes over all classes, none overlapping a better one of its class.

    Args:
        bbox: (K, 4).
        scores: (K, classes without the background).
        score_thresh: boxes with a lower score are left out.
        nms_thresh: intersection over union from which on boxes overlap.
        limit: the most boxes that are left.
    """
    rows, labels = np.nonzero(scores >= score_thresh)
    order = np.argsort(-scores[rows, labels], kind="stable")
    rows, labels = rows[order], labels[order]
    used, rows = np.unique(rows, return_inverse=True)
    kept = suppress(bbox[used], nms_thresh, rows, labels, limit)
    rows, labels = used[rows[kept]], labels[kept]
    return Boxes(
        bbox[rows].astype(np.float32), labels.astype(np.int32), scores[rows, labels].astype(np.float32)
    )


def detect_all(detector: Detector, images: Iterable[np.ndarray], batch_size: int = 32) -> list[Boxes]:
    """Boxes in any number of images, a batch at a time."""
    found: list[Boxes] = []
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            found += detector.detect(batch)
            batch = []
    return found + (detector.detect(batch) if batch else [])
