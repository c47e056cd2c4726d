"""Mean average precision by the rules of PASCAL VOC 2007, and by those of MS COCO."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from chainercv.evaluations import (
    calc_detection_voc_ap,
    calc_detection_voc_prec_rec,
    eval_detection_coco,
)

from detector import Boxes, Detector, detect_all
from encoding import Detections
from errors import InputError
from ranks import Alone

# Boxes found in an image, and what the data set says that it shows.
Result = tuple[Boxes, Any]

# From this overlap on a box has found an object.
IOU_THRESHOLD = 0.5
# COCO's mean over ten overlaps, and two of these.
COCO_OVERLAPS = ("0.50:0.95", "0.50", "0.75")


def evaluate(detector: Detector, dataset: Detections, ranks: Alone) -> np.ndarray | None:
    """Average precision of each class by the rules of VOC 2007, (classes,), NaN where the data set has no
    object of it. Rank 0 gets it, the others None."""
    results = detect_in(detector, dataset, ranks)
    return average_precisions(results, detector.model.n_fg_class) if results else None


def detect_in(detector: Detector, dataset: Detections, ranks: Alone) -> list[Result]:
    """What is found in every image, and what it shows, in the order of the images.

    Every rank detects in its share of them; rank 0 gets the result, the others an empty list.
    """
    indices = range(ranks.rank, len(dataset), ranks.size)
    found = detect_all(detector, map(dataset.image, indices))
    shares = ranks.gather([(i, boxes, dataset.objects(i)) for i, boxes in zip(indices, found, strict=True)])
    results = sorted((entry for share in shares for entry in share), key=lambda entry: entry[0])
    return [(boxes, objects) for _, boxes, objects in results]


def mean_precision(precisions: np.ndarray) -> float | None:
    """Mean over the classes that the data set has objects of; None if it has none at all."""
    return float(np.nanmean(precisions)) if np.isfinite(precisions).any() else None


def average_precisions(results: Sequence[Result], n_classes: int) -> np.ndarray:
    """Average precision of each class, by the rules of VOC 2007."""
    predicted, true = zip(*results, strict=True)
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


def require_pycocotools() -> None:
    if importlib.util.find_spec("pycocotools") is None:
        raise InputError("--dataset coco needs a package that is not there: pip install pycocotools.")


def coco_precisions(results: Sequence[Result], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Average precision of each class by the rules of COCO, (classes,), for each of its overlaps by name.

    Args:
        results: with `CocoObjects`.
        labels: COCO's label for each class of the detector.
    """
    if not any(len(entry.label) for result in results for entry in result):
        return {overlap: np.full(len(labels), np.nan) for overlap in COCO_OVERLAPS}
    predicted = [boxes._replace(label=labels[boxes.label].astype(np.int32)) for boxes, _ in results]
    found = eval_detection_coco(
        *zip(*predicted, strict=True), *zip(*(objects for _, objects in results), strict=True)
    )
    precisions = {}
    for overlap in COCO_OVERLAPS:
        of_label = found[f"ap/iou={overlap}/area=all/max_dets=100"]
        precisions[overlap] = np.append(of_label, np.full(max(labels) + 1, np.nan))[labels]
    return precisions
