"""Mean average precision by the rules of PASCAL VOC 2007."""

from __future__ import annotations

import numpy as np
from chainercv.evaluations import calc_detection_voc_ap, calc_detection_voc_prec_rec

from annotations import Objects
from detector import Boxes, Detector, detect_all
from encoding import Detections
from ranks import Alone

# From this overlap on a box has found an object.
IOU_THRESHOLD = 0.5


def evaluate(detector: Detector, dataset: Detections, ranks: Alone) -> np.ndarray | None:
    """Average precision of each class, (classes,), NaN where the data set has no object of it.

    Every rank detects in its share of the images; rank 0 gets the result, the others None.
    """
    indices = range(ranks.rank, len(dataset), ranks.size)
    found = detect_all(detector, map(dataset.image, indices))
    shares = ranks.gather([(i, boxes, dataset.objects(i)) for i, boxes in zip(indices, found, strict=True)])
    return average_precisions(shares, detector.model.n_fg_class) if shares else None


def mean_precision(precisions: np.ndarray) -> float | None:
    """Mean over the classes that the data set has objects of; None if it has none at all."""
    return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else None


def average_precisions(shares: list[list[tuple[int, Boxes, Objects]]], n_classes: int) -> np.ndarray:
    """Average precision of each class from (image's number, Boxes, Objects) in any order."""
    results = sorted((entry for share in shares for entry in share), key=lambda entry: entry[0])
    predicted = [boxes for _, boxes, _ in results]
    true = [objects for _, _, objects in results]
    precisions = np.full(n_classes, np.nan)
    if not any(len(entry.label) for entry in (*predicted, *true)):
        return precisions
    # ChainerCV's end with the last class that was found or is there. Of a class that was not found, precision
    # is not a number.
    with np.errstate(invalid="ignore"):
        curves = calc_detection_voc_prec_rec(
            *zip(*predicted, strict=True), *zip(*true, strict=True), iou_thresh=IOU_THRESHOLD
        )
    seen = calc_detection_voc_ap(*curves, use_07_metric=True)
    precisions[: len(seen)] = seen
    return precisions
