"""CIFAR-10 and -100 from their published files, and a stand-in of digits on photographs that draws itself."""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from digit_images import Sources, enlarge, load_sources, split_digits, tint
from errors import InputError

SIDE, PADDING = 32, 4
ARCHIVES = {10: "cifar-10-python.tar.gz", 100: "cifar-100-python.tar.gz"}
FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
TRAIN_FILES = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}
TEST_FILES = {10: ["test_batch"], 100: ["test"]}
LABELS = {10: "labels", 100: "fine_labels"}
# Of the training images, by channel, from 0 to 1.
MEAN = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4867, 0.4408)}
STD = {10: (0.2023, 0.1994, 0.2010), 100: (0.2675, 0.2565, 0.2761)}


class LabelledImages(NamedTuple):
    """Images, uint8 (N, 3, 32, 32), and their classes, int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class CifarSamples:
    """Normalized images; for training shifted by up to four pixels and mirrored, anew in every epoch.

    Attributes:
        data: images and classes.
        n_class: whose mean and deviation normalize the images.
        dtype: of the images that come out.
        seed: of the changes; None for no change.
    """

    data: LabelledImages
    n_class: int
    dtype: Any
    seed: int | None = None

    def sample(self, epoch: int, index: int) -> tuple[np.ndarray, np.int32]:
        image = self.data.images[index]
        if self.seed is not None:
            image = _changed(image, np.random.default_rng([self.seed, epoch, index]))
        mean, std = (np.array(by_class[self.n_class]).reshape(3, 1, 1) for by_class in (MEAN, STD))
        return ((image / 255 - mean) / std).astype(self.dtype), self.data.labels[index]


def read_cifar(folder: Path, n_class: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images of CIFAR-`n_class`.

    Args:
        folder: holds the published "python version", packed or unpacked.
        n_class: 10 or 100.

    Raises:
        InputError: it does not, or a file is damaged.
    """
    train, test = (
        [_read(folder, n_class, name) for name in names[n_class]] for names in (TRAIN_FILES, TEST_FILES)
    )
    return _joined(train), _joined(test)


def draw_stand_in(
    n_class: int, n_train: int = 1000, n_test: int = 300
) -> tuple[LabelledImages, LabelledImages]:
    """Digits (10 classes) or numbers of two digits (100 classes) on crops of photographs, in CIFAR's form.

    The same call always gives the same images; no scanned digit is in both sets.
    """
    sources = load_sources()
    train_pool, test_pool = split_digits(len(sources.labels), seed=0)
    return (
        _draw(sources, train_pool, n_class, n_train, np.random.default_rng([0, 1])),
        _draw(sources, test_pool, n_class, n_test, np.random.default_rng([0, 2])),
    )


def _changed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    top, left = rng.integers(2 * PADDING + 1, size=2)
    crop = padded[:, top : top + SIDE, left : left + SIDE]
    return crop[:, :, ::-1] if rng.random() < 0.5 else crop


def _draw(
    sources: Sources, pool: np.ndarray, n_class: int, n_images: int, rng: np.random.Generator
) -> LabelledImages:
    n_digits = 1 if n_class == 10 else 2
    width = SIDE // n_digits
    images, labels = np.empty((n_images, SIDE, SIDE, 3), np.uint8), np.zeros(n_images, np.int32)
    for i in range(n_images):
        photograph = sources.photographs[rng.integers(len(sources.photographs))]
        top, left = (int(rng.integers(extent - SIDE)) for extent in photograph.shape[:2])
        canvas = photograph[top : top + SIDE, left : left + SIDE].astype(np.float64)
        for place in range(n_digits):
            digit = rng.choice(pool)
            size = int(rng.integers(width * 3 // 4, width + 1))
            y = int(rng.integers(SIDE - size + 1))
            x = place * width + int(rng.integers(width - size + 1))
            region = canvas[y : y + size, x : x + size]
            region += enlarge(sources.scans[digit], size)[..., None] * (tint(region, rng) - region)
            labels[i] = 10 * labels[i] + sources.labels[digit]
        images[i] = canvas.round().clip(0, 255)
    return LabelledImages(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)


def _read(folder: Path, n_class: int, name: str) -> LabelledImages:
    unpacked, packed = folder / FOLDERS[n_class] / name, folder / ARCHIVES[n_class]
    source = unpacked if unpacked.exists() else packed
    try:
        if source == unpacked:
            content = unpacked.read_bytes()
        else:
            with tarfile.open(packed) as archive:
                member = archive.extractfile(f"{FOLDERS[n_class]}/{name}")
                content = member.read() if member else b""
        fields = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
        images = np.asarray(fields["data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
        labels = np.asarray(fields[LABELS[n_class]], dtype=np.int32)
    except FileNotFoundError:
        raise InputError(
            f"CIFAR-{n_class} is not in {folder}: put {ARCHIVES[n_class]} of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there, or train on --dataset digits."
        ) from None
    except (OSError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError, tarfile.TarError):
        raise InputError(f"{source} is damaged at {name}: fetch it again.") from None
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= n_class:
        raise InputError(f"{source} does not hold a class of CIFAR-{n_class} for each image: fetch it again.")
    return LabelledImages(images, labels)


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values only; a pickle could otherwise run any code."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        of_arrays = module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype", "scalar")
        # Python 3 writes bytes in this way where Python 2 has to read them.
        if of_arrays or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array.")


def _joined(parts: list[LabelledImages]) -> LabelledImages:
    return LabelledImages(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
