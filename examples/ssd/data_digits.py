"""A detection data set that makes itself: handwritten digits on photographs, in VOC's layout.

The digits are scikit-learn's (8x8 scans, `load_digits`), enlarged, tinted and blended onto crops of its two
photographs (`load_sample_images`). No digit is in both the training and the test images. The same settings
always give the same images.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from digit_images import Sources, enlarge, load_sources, split_digits, tint
from errors import InputError
from folders import made_once

DIGIT_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
YEAR = "VOC2007"
SPLITS = ("trainval", "test")
TRAIN_PARTS = ((YEAR, "trainval"),)
TEST_PARTS = ((YEAR, "test"),)
DEFAULT_FOLDER = Path(__file__).resolve().parent / "data" / "digits"
MANIFEST = "digits.json"

# A digit's pixels are 0 to 16; where less than this share of the ink is, the box ends.
INK_AT_EDGE = 0.3
JPEG_QUALITY = 92
PLACEMENT_TRIALS = 30


@dataclass(frozen=True)
class DigitsSettings:
    """What decides every pixel of the set.

    Attributes:
        seed: of all draws.
        train_images, test_images: numbers of images.
        side: height and width of an image, in pixels.
        most_digits: an image shows 1 to this many digits.
        smallest, largest: side of an enlarged scan, in pixels.
        version: raised when the drawing changes, so that old folders are not taken for new ones.
    """

    seed: int = 0
    train_images: int = 1000
    test_images: int = 200
    side: int = 96
    most_digits: int = 4
    smallest: int = 24
    largest: int = 56
    version: int = 1


class Placed(NamedTuple):
    """A digit in an image: its label and its box (y_min, x_min, y_max, x_max), pixels counted from 0."""

    label: int
    box: tuple[int, int, int, int]


def find_digits(folder: Path | None, settings: DigitsSettings = DigitsSettings()) -> Path:
    """The set's folder: the one given or DEFAULT_FOLDER; a set of these settings is made if there is none.

    Raises InputError if the folder holds something else, a damaged set, or one of another version.
    """
    folder = folder or DEFAULT_FOLDER
    if not folder.exists():
        make_digits(folder, settings)
    _check_complete(folder)
    return folder


def make_digits(folder: Path, settings: DigitsSettings) -> None:
    """Write the set next to `folder` and move it there when complete.

    Several processes may do so at once: the first one's set stays.
    """
    sources = load_sources()
    made_once(folder, lambda working: _write_set(working, sources, settings), "--dataset-dir")


def draw_image(
    sources: Sources, pool: np.ndarray, settings: DigitsSettings, rng: np.random.Generator
) -> tuple[np.ndarray, list[Placed]]:
    """One image, uint8 (side, side, 3), and the digits of `pool` in it, none over another."""
    side = settings.side
    photograph = sources.photographs[rng.integers(len(sources.photographs))]
    top, left = (int(rng.integers(extent - side)) for extent in photograph.shape[:2])
    canvas = photograph[top : top + side, left : left + side].astype(np.float64)
    placed: list[Placed] = []
    wanted = rng.integers(1, settings.most_digits + 1)
    for _ in range(PLACEMENT_TRIALS):
        if len(placed) == wanted:
            break
        digit = rng.choice(pool)
        size = int(rng.integers(settings.smallest, settings.largest + 1))
        y, x = (int(v) for v in rng.integers(side - size, size=2))
        ink = enlarge(sources.scans[digit], size)
        box = _ink_box(ink, y, x)
        if any(_overlap(box, other.box) for other in placed):
            continue
        region = canvas[y : y + size, x : x + size]
        region += ink[..., None] * (tint(region, rng) - region)
        placed.append(Placed(int(sources.labels[digit]), box))
    return canvas.round().clip(0, 255).astype(np.uint8), placed


def _write_set(folder: Path, sources: Sources, settings: DigitsSettings) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / YEAR / name).mkdir(parents=True)
    pools = split_digits(len(sources.labels), settings.seed)
    counts = (settings.train_images, settings.test_images)
    first = 1
    for part, (split, pool, count) in enumerate(zip(SPLITS, pools, counts, strict=True)):
        ids = [f"{number:06d}" for number in range(first, first + count)]
        for i, id_ in enumerate(ids):
            image, placed = draw_image(
                sources, pool, settings, np.random.default_rng([settings.seed, 1 + part, i])
            )
            Image.fromarray(image).save(_image_file(folder, id_), quality=JPEG_QUALITY)
            _annotation(id_, settings.side, placed).write(_annotation_file(folder, id_))
        _split_list(folder, split).write_text("".join(f"{id_}\n" for id_ in ids))
        first += count
    (folder / MANIFEST).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def _annotation(id_: str, side: int, placed: list[Placed]) -> ElementTree.ElementTree:
    root = ElementTree.Element("annotation")
    _add(root, folder=YEAR, filename=f"{id_}.jpg")
    _add(ElementTree.SubElement(root, "size"), width=side, height=side, depth=3)
    for digit in placed:
        node = ElementTree.SubElement(root, "object")
        _add(node, name=DIGIT_CLASSES[digit.label], difficult=0)
        # The devkit counts pixels from 1.
        y_min, x_min, y_max, x_max = (edge + 1 for edge in digit.box)
        _add(ElementTree.SubElement(node, "bndbox"), xmin=x_min, ymin=y_min, xmax=x_max, ymax=y_max)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _add(node: ElementTree.Element, **fields: object) -> None:
    for tag, value in fields.items():
        ElementTree.SubElement(node, tag).text = str(value)


def _ink_box(ink: np.ndarray, y: int, x: int) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero((ink > INK_AT_EDGE).any(axis=axis)) for axis in (1, 0))
    return int(y + rows[0]), int(x + columns[0]), int(y + rows[-1] + 1), int(x + columns[-1] + 1)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _check_complete(folder: Path) -> None:
    fault = _fault(folder)
    if fault:
        raise InputError(
            f"{folder} is no complete digits set, since {fault}: delete it and train_multi.py --dataset-dir "
            f"{folder} makes it again, or name another folder."
        )


def _fault(folder: Path) -> str | None:
    """What is wrong with a set, in a few words."""
    path = folder / MANIFEST
    try:
        settings = DigitsSettings(**json.loads(path.read_text()))
        if settings.version != DigitsSettings.version:
            return f"it is of version {settings.version} and not of {DigitsSettings.version}"
        for split, count in zip(SPLITS, (settings.train_images, settings.test_images), strict=True):
            path = _split_list(folder, split)
            ids = path.read_text().split()
            if len(ids) != count:
                return f"{path.relative_to(folder)} names {len(ids)} images and not {count}"
            for id_ in ids:
                for path in (_image_file(folder, id_), _annotation_file(folder, id_)):
                    path.stat()
    except OSError as error:
        return f"{path.relative_to(folder)} can't be read ({error.strerror})"
    except (ValueError, TypeError):
        return f"{path.relative_to(folder)} is damaged"
    return None


def _split_list(folder: Path, split: str) -> Path:
    return folder / YEAR / "ImageSets" / "Main" / f"{split}.txt"


def _image_file(folder: Path, id_: str) -> Path:
    return folder / YEAR / "JPEGImages" / f"{id_}.jpg"


def _annotation_file(folder: Path, id_: str) -> Path:
    return folder / YEAR / "Annotations" / f"{id_}.xml"
