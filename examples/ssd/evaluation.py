"""Mean average precision by the rules of PASCAL VOC 2007."""

from __future__ import annotations

import numpy as np
from chainercv.evaluations import eval_detection_voc

from data_voc import Objects
from detector import Boxes, Detector, detect_all
from encoding import Detections
from ranks import Alone


def evaluate(detector: Detector, dataset: Detections, ranks: Alone) -> np.ndarray | None:
    """Average precision of each class, (classes,), NaN where the data set has no object of it.

    Every rank detects in its share of the images; rank 0 gets the result, the others None.
    """
    indices = range(ranks.rank, len(dataset), ranks.size)
    found = detect_all(detector, map(dataset.image, indices))
    shares = ranks.gather([(i, boxes, dataset.objects(i)) for i, boxes in zip(indices, found, strict=True)])
    return average_precisions(shares, detector.model.n_fg_class) if shares else None


def average_precisions(shares: list[list[tuple[int, Boxes, Objects]]], n_classes: int) -> np.ndarray:
    """Average precision of each class from (image's number, Boxes, Objects) in any order."""
    results = sorted((entry for share in shares for entry in share), key=lambda entry: entry[0])
    predicted = [boxes for _, boxes, _ in results]
    true = [objects for _, _, objects in results]
    precisions = np.full(n_classes, np.nan)
    # ChainerCV's end with the last class that was found or is there.
    seen = eval_detection_voc(
        *zip(*predicted, strict=True), *zip(*true, strict=True), iou_thresh=0.5, use_07_metric=True
    )["ap"]
    precisions[: len(seen)] = seen
    return precisions
