"""The data sets that can be named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chainercv.datasets import coco_bbox_label_names

import data_digits
import data_voc
from augmentation import DIGITS_RECIPE, VOC_RECIPE, Recipe
from data_voc import JoinedDatasets, open_parts
from errors import InputError


@dataclass(frozen=True)
class DatasetKind:
    """A data set in VOC's layout.

    Attributes:
        classes: names of the classes, in the order of their labels.
        recipe: how its training images are augmented.
        train_parts, test_parts: (year's folder, split) pairs.
        locate: finds (or makes) its folder, given the one that the user named, if any; InputError if it
            can't.
    """

    classes: tuple[str, ...]
    recipe: Recipe
    train_parts: tuple[tuple[str, str], ...]
    test_parts: tuple[tuple[str, str], ...]
    locate: Callable[[Path | None], Path]

    def open_train(self, folder: Path | None) -> JoinedDatasets:
        return open_parts(self.locate(folder), self.train_parts, self.classes, use_difficult=False)

    def open_test(self, folder: Path | None) -> JoinedDatasets:
        return open_parts(self.locate(folder), self.test_parts, self.classes, use_difficult=True)


COCO = "coco"
DATASETS = {
    "voc": DatasetKind(
        data_voc.VOC_CLASSES, VOC_RECIPE, data_voc.TRAIN_PARTS, data_voc.TEST_PARTS, data_voc.find_devkit
    ),
    "digits": DatasetKind(
        data_digits.DIGIT_CLASSES,
        DIGITS_RECIPE,
        data_digits.TRAIN_PARTS,
        data_digits.TEST_PARTS,
        data_digits.find_digits,
    ),
}


def class_names(dataset: str) -> tuple[str, ...]:
    """Names of a data set's classes, in the order of their labels."""
    return tuple(coco_bbox_label_names) if dataset == COCO else DATASETS[dataset].classes


def dataset_with_classes(n_classes: int) -> str:
    """The name of the data set that has so many classes; COCO is one to evaluate on only."""
    if n_classes == len(coco_bbox_label_names):
        return COCO
    for name, kind in DATASETS.items():
        if len(kind.classes) == n_classes:
            return name
    raise InputError(f"No data set here has {n_classes} classes: {', '.join(DATASETS)} have others.")
