"""Annotations of images in PASCAL VOC's XML: what an image shows, and where."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import InputError, reason

# float32, in which boxes are kept, has all whole numbers up to here.
LARGEST = 2**24
EDGES = ("ymin", "xmin", "ymax", "xmax")


class Objects(NamedTuple):
    """What an image shows: boxes (R, 4) float32 as (y_min, x_min, y_max, x_max) in pixels counted from 0,
    labels (R,) int32 and flags (R,) bool of objects that an evaluation leaves out."""

    bbox: np.ndarray
    label: np.ndarray
    difficult: np.ndarray


class Annotation(NamedTuple):
    """A file's objects, and the image's height and width if it says so."""

    objects: Objects
    size: tuple[int, int] | None


def read_annotation(path: Path, classes: Sequence[str]) -> Annotation:
    """Raises InputError if the file is missing, or anything in it makes no sense."""
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}> and not <annotation>")
        found = [_object(node, classes) for node in root.iter("object")]
        size = _size(root)
    # Parsers raise what a file's encoding, numbers and nesting bring about.
    except Exception as error:
        raise damaged(path, reason(error)) from None
    objects = Objects(
        np.array([box for box, _, _ in found], dtype=np.float32).reshape(-1, 4),
        np.array([label for _, label, _ in found], dtype=np.int32),
        np.array([difficult for _, _, difficult in found], dtype=bool),
    )
    return Annotation(objects, size)


def inside(path: Path, annotation: Annotation, size: tuple[int, int]) -> Objects:
    """The objects of an annotation in an image of this height and width.

    Boxes may reach a pixel beyond the image, as those of tools that count from 0 do, and are clipped. Raises
    InputError if they reach further, or if the annotation is of an image of another size.
    """
    if annotation.size not in (None, size):
        raise damaged(
            path,
            f"it is of an image of {_in_words(annotation.size)} pixels, and its image, upright, is of "
            f"{_in_words(size)}",
        )
    bbox, label, difficult = annotation.objects
    corner = np.array(size * 2, dtype=np.float32)
    clipped = np.minimum(bbox, corner)
    if (bbox > corner + 1).any() or (clipped[:, :2] >= clipped[:, 2:]).any():
        raise damaged(path, f"a box ends outside of its image of {_in_words(size)} pixels")
    return Objects(clipped, label, difficult)


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged ({why}): restore or mend it.")


def _object(node: ElementTree.Element, classes: Sequence[str]) -> tuple[list[int], int, bool]:
    name = _text(node, "name").lower()
    if name not in classes:
        raise ValueError(f"no class is called {name!r}")
    # The devkit counts pixels from 1; some tools from 0.
    box = [max(_pixel(_text(node, f"bndbox/{edge}"), edge) - 1, 0) for edge in EDGES]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"the box of a {name} is empty")
    difficult = (node.findtext("difficult") or "0").strip() or "0"
    if difficult not in ("0", "1"):
        raise ValueError(f"difficult is {difficult!r}, neither 0 nor 1")
    return box, classes.index(name), difficult == "1"


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Some tools leave the size out, or write 0."""
    size = [int(float((root.findtext(f"size/{side}") or "0").strip() or "0")) for side in ("height", "width")]
    return (size[0], size[1]) if all(size) else None


def _pixel(text: str, what: str) -> int:
    value = float(text)
    if not math.isfinite(value) or not 0 <= value < LARGEST:
        raise ValueError(f"{what} is {text}, which is no place in an image")
    return int(value)


def _text(node: ElementTree.Element, tag: str) -> str:
    text = node.findtext(tag)
    if text is None:
        raise ValueError(f"an object has no {tag}")
    return text.strip()


def _in_words(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
