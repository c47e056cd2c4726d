"""What the tests of the SSD example share: its modules, small data sets, ways to run its scripts."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ada_loss.chainer  # noqa: F401  (before Chainer)

HERE = Path(__file__).resolve().parent
# The example's scripts import each other as they lie; so do the tests the helpers beside them.
EXAMPLES = HERE.parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "ssd"), str(EXAMPLES / "common"), str(HERE)]

from data_digits import DigitsSettings, find_digits  # noqa: E402


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits set of 12 training and 4 test images."""
    few = DigitsSettings(train_images=12, test_images=4)
    return find_digits(tmp_path_factory.mktemp("data") / "digits", few)


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PASCAL VOC devkit: two training images a year, two test images, one difficult object in each."""
    return make_devkit(tmp_path_factory.mktemp("VOCdevkit"), n_images=2)


def make_devkit(folder: Path, n_images: int) -> Path:
    """Splits of `n_images` each: VOC 2007 trainval and test, VOC 2012 trainval."""
    rng = np.random.default_rng(5)
    for year, splits in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / year / name).mkdir(parents=True)
        for split in splits:
            ids = [f"{split}_{i}" for i in range(n_images)]
            (folder / year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
            for id_ in ids:
                write_voc_image(folder / year, id_, rng)
    return folder


def write_voc_image(folder: Path, id_: str, rng: np.random.Generator) -> None:
    height, width = rng.integers(60, 90, size=2)
    pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "JPEGImages" / f"{id_}.jpg")
    root = ElementTree.Element("annotation")
    for name, difficult in (("dog", 0), ("person", 1), ("cat", 0)):
        y, x = rng.integers(1, 20, size=2)
        box = dict(xmin=x, ymin=y, xmax=x + rng.integers(15, 35), ymax=y + rng.integers(15, 35))
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = name
        ElementTree.SubElement(node, "difficult").text = str(difficult)
        bndbox = ElementTree.SubElement(node, "bndbox")
        for tag, value in box.items():
            ElementTree.SubElement(bndbox, tag).text = str(value)
    ElementTree.ElementTree(root).write(folder / "Annotations" / f"{id_}.xml")
