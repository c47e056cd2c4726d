"""MS COCO for evaluation, by ChainerCV's loader: instances of the validation set of 2017."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from chainer.dataset.download import get_dataset_root
from chainercv.datasets import COCOBboxDataset, coco_bbox_label_names

from data_voc import VOC_CLASSES
from errors import InputError, reason
from images import read_image

COCO_CLASSES: tuple[str, ...] = tuple(coco_bbox_label_names)
# VOC's classes that COCO calls otherwise.
NAMES_IN_COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
SPLIT, YEAR = "val", "2017"


class CocoObjects(NamedTuple):
    """What an image shows: boxes (R, 4) float32 as (y_min, x_min, y_max, x_max), labels (R,) int32, areas of
    the objects in pixels (R,), and flags (R,) of boxes around crowds."""

    bbox: np.ndarray
    label: np.ndarray
    area: np.ndarray
    crowded: np.ndarray


@dataclass(frozen=True)
class CocoDataset:
    """Image and objects by index."""

    loader: COCOBboxDataset

    @classmethod
    def open(cls, folder: Path | None) -> CocoDataset:
        """COCO in a folder, or where ChainerCV keeps it. InputError if it is not there, or damaged."""
        root = folder or Path(get_dataset_root()) / "pfnet" / "chainercv" / "coco"
        listed = root / "annotations" / f"instances_{SPLIT}{YEAR}.json"
        if not listed.is_file():
            raise InputError(
                f"COCO is not in {root}: unpack the images to {root / 'images' / f'{SPLIT}{YEAR}'} and the "
                f"annotations so that {listed} exists, or name their folder with --dataset-dir."
            )
        try:
            loader = COCOBboxDataset(
                str(root), SPLIT, YEAR, use_crowded=True, return_area=True, return_crowded=True
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{listed} is damaged ({reason(error)}): restore the data set.") from None
        if len(loader.cat_ids) != len(COCO_CLASSES):
            raise InputError(
                f"{listed} has {len(loader.cat_ids)} categories and not 80: restore the data set."
            )
        return cls(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def image(self, i: int) -> np.ndarray:
        """RGB, (3, H, W), uint8, read-only."""
        return read_image(
            Path(self.loader.img_root) / self.loader.id_to_prop[self.loader.ids[i]]["file_name"]
        )

    def objects(self, i: int) -> CocoObjects:
        try:
            return CocoObjects(*self.loader._get_annotations(i))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"COCO's annotations of image {self.loader.ids[i]} are damaged ({reason(error)}): restore "
                "the data set."
            ) from None


def labels_in_coco(n_classes: int) -> np.ndarray | None:
    """COCO's label for each class of a model that knows COCO's classes, or VOC's; None if it is neither."""
    if n_classes == len(COCO_CLASSES):
        return np.arange(n_classes)
    if n_classes != len(VOC_CLASSES):
        return None
    return np.array([COCO_CLASSES.index(NAMES_IN_COCO.get(name, name)) for name in VOC_CLASSES])
