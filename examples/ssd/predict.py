#!/usr/bin/env python3
"""Draws the objects that a trained SSD finds in images; see --help."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from command_line import share
from datasets import class_names
from detector import DRAWING_THRESH, Boxes, Detector
from drawing import draw_boxes
from errors import InputError, ends_cleanly, reason
from images import read_image
from output import make_folder
from saved import detector_of, load_detector_model, weights_parser

IMAGE_ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
    *(".jp2", ".tga", ".ico", ".pbm", ".pgm", ".ppm", ".pnm"),
}
MOST_NAMED = 5
# Pictures narrower than this are enlarged, or the names of the classes would hide them.
LEAST_WIDTH = 288
LARGEST = 4096


@ends_cleanly
@kernels.using("auto")
def main(argv: Sequence[str] | None = None) -> int:
    parser = weights_parser("Draw the objects that a trained SSD finds in images.")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the pictures")
    parser.add_argument("--score", type=share, default=DRAWING_THRESH, help="least score of a box")
    args = parser.parse_args(argv)

    paths = find_images(args.images)
    targets = [args.out / name for name in picture_names(paths)]
    refuse_to_overwrite(targets)
    model, dataset = load_detector_model(args.weights)
    detector = detector_of(model, args, args.score)
    names = class_names(dataset)
    make_folder(args.out)
    left_out = []
    for path, target in zip(paths, targets, strict=True):
        try:
            boxes = draw(detector, path, names, target)
        except InputError as error:
            left_out.append(str(error))
            continue
        print(f"{path}: {in_words(boxes, names, args.score)} -> {target}", flush=True)
    refuse_what_was_left_out(left_out, len(paths))
    return 0


def draw(detector: Detector, path: Path, names: Sequence[str], target: Path) -> Boxes:
    """Draw what is found in an image, and return it. Raises InputError if that can't be read or written."""
    image = read_image(path)
    (boxes,) = detector.detect([image])
    height, width = image.shape[1:]
    # Strips are not enlarged beyond what a screen shows.
    enlarge = min(math.ceil(LEAST_WIDTH / width), max(1, LARGEST // height))
    picture = draw_boxes(image, boxes, names, enlarge)
    try:
        picture.save(target)
    except (OSError, ValueError) as error:
        target.unlink(missing_ok=True)
        raise InputError(
            f"{target} can't be written ({reason(error)}): name another folder with --out."
        ) from None
    return boxes


def refuse_what_was_left_out(errors: Sequence[str], n_images: int) -> None:
    """Raises InputError that lists them if there are any."""
    if n_images == len(errors) == 1:
        raise InputError(errors[0])
    if errors:
        lines = "".join(f"\n  {error}" for error in errors)
        raise InputError(f"{len(errors)} of {n_images} images were left out:{lines}")


def in_words(boxes: Boxes, names: Sequence[str], score: float) -> str:
    """How many objects there are, and the best of them; `score` is the least that was asked for."""
    best = [f"{names[label]} {sure:.2f}" for _, label, sure in zip(*boxes, strict=True)][:MOST_NAMED]
    found = len(boxes.score)
    if not found:
        return f"no object with a score of {score:g} or more"
    more = ", ..." if found > MOST_NAMED else ""
    return f"{found} object{'s' if found > 1 else ''} ({', '.join(best)}{more})"


def find_images(given: Iterable[Path]) -> list[Path]:
    """The files given, and the images in the folders given."""
    paths: list[Path] = []
    for path in given:
        try:
            if path.is_dir():
                paths += sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_ENDINGS)
            elif path.exists():
                paths.append(path)
            else:
                raise InputError(f"There is no image or folder {path}: name one that is there.")
        except OSError as error:
            raise InputError(f"{path} can't be looked at ({reason(error)}): name another one.") from None
    if not paths:
        raise InputError("There is no image in the folders named: name others, or image files.")
    return paths


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image's picture: its own, with the old ending only where it tells images apart."""
    stems = Counter(path.stem for path in paths)
    return [f"{path.stem if stems[path.stem] == 1 else path.name}.png" for path in paths]


def refuse_to_overwrite(targets: Sequence[Path]) -> None:
    name, times = Counter(target.name for target in targets).most_common(1)[0]
    if times > 1:
        raise InputError(f"Two images would both be drawn to {name}: predict them one after the other.")
    existing = next((target for target in targets if os.path.lexists(target)), None)
    if existing is not None:
        raise InputError(f"{existing} is already there: name another folder with --out.")


if __name__ == "__main__":
    sys.exit(main())
