"""ILSVRC 2012 from its folders of images, and a stand-in of digits on photographs that makes itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chainercv.datasets import DirectoryParsingLabelDataset, directory_parsing_label_names
from chainercv.transforms import center_crop, resize, scale
from PIL import Image

from digit_images import enlarge, load_sources, split_digits, tint
from errors import InputError
from folders import made_once, read_sample

STAND_IN = Path(__file__).resolve().parent / "data" / "digits"
STAND_IN_IMAGES = {"train": 30, "val": 6}
# Of ImageNet, RGB.
MEAN = np.array([123.15163084, 115.90288257, 103.0626238], np.float32).reshape(3, 1, 1)
# A crop has this share of an image's area and is that much wider than high.
AREAS, ASPECTS = (0.08, 1.0), (3 / 4, 4 / 3)
TRIALS = 10
# For validation the shorter side is scaled to 256 where the middle 224 are looked at.
MARGIN = 256 / 224


@dataclass(frozen=True)
class ImageNetSamples:
    """Images cut to a square without the mean; for training at random and mirrored, anew in every epoch.

    Attributes:
        images: a labelled data set of ChainerCV.
        side: of the square, in pixels.
        dtype: of the images that come out.
        seed: of the cuts; None for the middle.
    """

    images: DirectoryParsingLabelDataset
    side: int
    dtype: Any
    seed: int | None = None

    def sample(self, epoch: int, index: int) -> tuple[np.ndarray, np.int32]:
        image, label = read_sample(self.images, index, lambda: self.images.img_paths[index])
        if self.seed is None:
            image = center_crop(scale(image, round(self.side * MARGIN)), (self.side, self.side))
        else:
            rng = np.random.default_rng([self.seed, epoch, index])
            image = resize(random_part(image, rng), (self.side, self.side))
            image = image[:, :, ::-1] if rng.random() < 0.5 else image
        return (image - MEAN).astype(self.dtype), label


def random_part(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part of random area and aspect of an image (3, H, W); all of it where none was found that fits."""
    height, width = image.shape[1:]
    for _ in range(TRIALS):
        area = rng.uniform(*AREAS) * height * width
        aspect = math.exp(rng.uniform(*np.log(ASPECTS)))
        part_height, part_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < part_height <= height and 0 < part_width <= width:
            top, left = rng.integers(height - part_height + 1), rng.integers(width - part_width + 1)
            return image[:, top : top + part_height, left : left + part_width]
    return image


def open_imagenet(folder: Path) -> tuple[DirectoryParsingLabelDataset, DirectoryParsingLabelDataset, int]:
    """Training and validation images, and the number of classes.

    Args:
        folder: holds train/CLASS/*.JPEG and val/CLASS/*.JPEG.

    Raises:
        InputError: it does not.
    """
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise InputError(
                f"{folder} has no folder {part} with one folder of images per class: name ILSVRC 2012's with "
                "--dataset-dir, or train on --dataset digits."
            )
    names = directory_parsing_label_names(str(folder / "train"))
    if not names or names != directory_parsing_label_names(str(folder / "val")):
        raise InputError(
            f"{folder}/train and {folder}/val do not have the same classes, one folder for each."
        )
    train, val = (DirectoryParsingLabelDataset(str(folder / part)) for part in ("train", "val"))
    for part, dataset in (("train", train), ("val", val)):
        if not len(dataset):
            raise InputError(f"{folder}/{part} holds no images.")
    return train, val, len(names)


def make_stand_in(folder: Path) -> Path:
    """A folder like ImageNet's with ten classes of digits on photographs; no scan is in both parts."""
    return made_once(folder, _write_stand_in, "--dataset-dir")


def _write_stand_in(folder: Path) -> None:
    sources = load_sources()
    pools = split_digits(len(sources.labels), seed=0)
    rng = np.random.default_rng(0)
    for (part, n_images), pool in zip(STAND_IN_IMAGES.items(), pools, strict=True):
        for label in range(10):
            (folder / part / f"digit-{label}").mkdir(parents=True)
            for i, digit in enumerate(rng.choice(pool[sources.labels[pool] == label], n_images)):
                height, width = (int(side) for side in rng.integers(48, 97, size=2))
                photograph = sources.photographs[rng.integers(len(sources.photographs))]
                top, left = (
                    rng.integers(photograph.shape[0] - height),
                    rng.integers(photograph.shape[1] - width),
                )
                canvas = photograph[top : top + height, left : left + width].astype(np.float64)
                size = min(height, width) * 5 // 6
                y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
                region = canvas[y : y + size, x : x + size]
                region += enlarge(sources.scans[digit], size)[..., None] * (tint(region, rng) - region)
                image = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
                image.save(folder / part / f"digit-{label}" / f"{i:04d}.JPEG", quality=92)
