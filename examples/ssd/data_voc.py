"""Reads detection data sets in the layout of the PASCAL VOC devkit.

A devkit is a folder with one folder per year (`VOC2007`, `VOC2012`), each of which holds

    JPEGImages/ID.jpg  Annotations/ID.xml  ImageSets/Main/SPLIT.txt (one ID a line)
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from chainer.dataset.download import get_dataset_root
from chainercv.datasets import voc_bbox_label_names
from PIL import Image, UnidentifiedImageError

from errors import InputError

VOC_CLASSES: tuple[str, ...] = tuple(voc_bbox_label_names)
TRAIN_PARTS = (("VOC2007", "trainval"), ("VOC2012", "trainval"))
TEST_PARTS = (("VOC2007", "test"),)
# Bytes of images that a split keeps in memory once they are read: all of a small set, some of VOC.
IN_MEMORY = 2**26


class Objects(NamedTuple):
    """What an image shows: boxes (R, 4) float32 as (y_min, x_min, y_max, x_max) in pixels counted from 0,
    labels (R,) int32 and flags (R,) bool of objects that an evaluation leaves out."""

    bbox: np.ndarray
    label: np.ndarray
    difficult: np.ndarray


@dataclass(frozen=True)
class VocDataset:
    """One split of one year: image and objects by index.

    Attributes:
        folder: the year's folder.
        ids: names of the images, without folder and ending.
        classes: names of the classes, in the order of their labels.
        use_difficult: whether objects flagged as difficult are given out; training leaves them out.
    """

    folder: Path
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    use_difficult: bool
    # What has been read already: every epoch wants the same again.
    _images: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _objects: dict[int, Objects] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, split: str, classes: Sequence[str], use_difficult: bool) -> VocDataset:
        """Raises InputError if the split's list, or a file that it names, is missing."""
        id_list = folder / "ImageSets" / "Main" / f"{split}.txt"
        try:
            ids = tuple(id_list.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{id_list} can't be read ({_reason(error)}): restore the data set there."
            ) from None
        if not ids:
            raise InputError(f"{id_list} names no image: restore the data set there.")
        dataset = cls(folder, ids, tuple(classes), use_difficult)
        for path in (
            path for i in range(len(ids)) for path in (dataset.image_path(i), dataset.objects_path(i))
        ):
            if not path.is_file():
                raise InputError(f"{path} is missing though {id_list.name} names it: restore the data set.")
        return dataset

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, i: int) -> Path:
        return self.folder / "JPEGImages" / f"{self.ids[i]}.jpg"

    def objects_path(self, i: int) -> Path:
        return self.folder / "Annotations" / f"{self.ids[i]}.xml"

    def image(self, i: int) -> np.ndarray:
        """RGB, (3, H, W), uint8, read-only."""
        if i in self._images:
            return self._images[i]
        image = read_image(self.image_path(i))
        if sum(kept.nbytes for kept in self._images.values()) + image.nbytes <= IN_MEMORY:
            self._images[i] = image
        return image

    def objects(self, i: int) -> Objects:
        """What image i shows, in read-only arrays."""
        if i not in self._objects:
            self._objects[i] = self._parse(self.objects_path(i))
        return self._objects[i]

    def _parse(self, path: Path) -> Objects:
        try:
            found = [_parse_object(node, self.classes) for node in ElementTree.parse(path).iter("object")]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise InputError(f"{path} is damaged ({_reason(error)}): restore the data set.") from None
        kept = [entry for entry in found if self.use_difficult or not entry[2]]
        objects = Objects(
            np.array([box for box, _, _ in kept], dtype=np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in kept], dtype=np.int32),
            np.array([difficult for _, _, difficult in kept], dtype=bool),
        )
        for array in objects:
            array.flags.writeable = False
        return objects


@dataclass(frozen=True)
class JoinedDatasets:
    """Several data sets, one behind the other."""

    parts: tuple[VocDataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.parts[0].classes

    def image(self, i: int) -> np.ndarray:
        part, i = self._locate(i)
        return part.image(i)

    def objects(self, i: int) -> Objects:
        part, i = self._locate(i)
        return part.objects(i)

    def _locate(self, i: int) -> tuple[VocDataset, int]:
        for part in self.parts:
            if i < len(part):
                return part, i
            i -= len(part)
        raise IndexError(i)


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB, (3, H, W), uint8, read-only.

    Raises InputError if there is none or it is damaged.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(
            f"{path} can't be read as an image ({_reason(error)}): restore or remove it."
        ) from None


def find_devkit(dataset_dir: Path | None) -> Path:
    """The folder with VOC2007 and VOC2012: the one given, its VOCdevkit, or where ChainerCV keeps it."""
    root = dataset_dir or Path(get_dataset_root()) / "pfnet" / "chainercv" / "voc"
    for folder in (root, root / "VOCdevkit"):
        if (folder / "VOC2007").is_dir():
            return folder
    raise InputError(
        f"PASCAL VOC is not in {root}: unpack VOC 2007 trainval and test and VOC 2012 trainval so that "
        f"{root / 'VOCdevkit' / 'VOC2007'} and .../VOC2012 exist, or name their folder with --dataset-dir, "
        "or use the digits set, which makes itself, with --dataset digits."
    )


def open_parts(
    devkit: Path, parts: Sequence[tuple[str, str]], classes: Sequence[str], use_difficult: bool
) -> JoinedDatasets:
    """The given (year's folder, split) pairs of a devkit as one data set."""
    opened = (VocDataset.open(devkit / year, split, classes, use_difficult) for year, split in parts)
    return JoinedDatasets(tuple(opened))


def _parse_object(node: ElementTree.Element, classes: tuple[str, ...]) -> tuple[list[int], int, bool]:
    name = _text(node, "name").lower()
    if name not in classes:
        raise ValueError(f"no class is called {name!r}")
    # The devkit counts pixels from 1.
    box = [int(float(_text(node, f"bndbox/{tag}"))) - 1 for tag in ("ymin", "xmin", "ymax", "xmax")]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"the box of a {name} is empty")
    return box, classes.index(name), (node.findtext("difficult") or "0").strip() == "1"


def _text(node: ElementTree.Element, tag: str) -> str:
    text = node.findtext(tag)
    if text is None:
        raise ValueError(f"an object has no {tag}")
    return text.strip()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
