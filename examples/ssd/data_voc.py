"""Reads detection data sets in the layout of the PASCAL VOC devkit.

A devkit is a folder with one folder per year (`VOC2007`, `VOC2012`), each of which holds

    JPEGImages/ID.jpg  Annotations/ID.xml  ImageSets/Main/SPLIT.txt (one ID a line)
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from chainer.dataset.download import get_dataset_root
from chainercv.datasets import voc_bbox_label_names

from annotations import Annotation, Objects, inside, read_annotation
from errors import InputError, reason
from images import image_size, read_image

VOC_CLASSES: tuple[str, ...] = tuple(voc_bbox_label_names)
TRAIN_PARTS = (("VOC2007", "trainval"), ("VOC2012", "trainval"))
TEST_PARTS = (("VOC2007", "test"),)
# Bytes of images that a split keeps in memory once they are read: all of a small set, some of VOC.
IN_MEMORY = 2**26


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
        """Raises InputError if the split's list, or a file that it names, is missing, or named twice."""
        id_list = folder / "ImageSets" / "Main" / f"{split}.txt"
        ids = _read_ids(id_list)
        dataset = cls(folder, ids, tuple(classes), use_difficult)
        for path in (
            path for i in range(len(ids)) for path in (dataset.image_path(i), dataset.objects_path(i))
        ):
            try:
                there = path.is_file()
            # Names too long for the system, folders that may not be looked into.
            except (OSError, ValueError) as error:
                raise InputError(f"{path} can't be read ({reason(error)}): restore the data set.") from None
            if not there:
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
        """What image i shows, in read-only arrays. InputError if that can't be, in an image of its size."""
        if i not in self._objects:
            path = self.objects_path(i)
            found = inside(path, self._parse(path), image_size(self.image_path(i)))
            kept = ~found.difficult | self.use_difficult
            objects = Objects(*(array[kept] for array in found))
            for array in objects:
                array.flags.writeable = False
            self._objects[i] = objects
        return self._objects[i]

    def _parse(self, path: Path) -> Annotation:
        return read_annotation(path, self.classes)


@dataclass(frozen=True)
class JoinedDatasets:
    """Several data sets, one behind the other."""

    parts: tuple[VocDataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.parts[0].classes

    def image_path(self, i: int) -> Path:
        part, i = self._locate(i)
        return part.image_path(i)

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


def _read_ids(path: Path) -> tuple[str, ...]:
    """The names in a split's list, one a line, in UTF-8 or UTF-16; other bytes stand for themselves."""
    try:
        content = path.read_bytes()
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16") if utf_16 else content.decode("utf-8-sig", errors="surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({reason(error)}): restore the data set there.") from None
    ids = tuple(line.strip() for line in re.split("[\r\n]", text) if line.strip())
    if not ids:
        raise InputError(f"{path} names no image: restore the data set there.")
    name, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} names {name} {times} times: name every image once.")
    return ids
