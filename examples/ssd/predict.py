#!/usr/bin/env python3
"""Draws the objects that a trained SSD finds in images; see --help."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from arguments import share
from data_voc import read_image
from datasets import DATASETS
from detector import DRAWING_THRESH, Boxes, Detector
from drawing import draw_boxes
from errors import InputError, ends_cleanly
from saved import load_detector_model, weights_parser

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}
MOST_NAMED = 5
# Pictures narrower than this are enlarged, or the names of the classes would hide them.
LEAST_WIDTH = 288


@ends_cleanly
@kernels.using("auto")
def main(argv: Sequence[str] | None = None) -> int:
    parser = weights_parser("Draw the objects that a trained SSD finds in images.")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for the pictures")
    parser.add_argument("--score", type=share, default=DRAWING_THRESH, help="least score of a box")
    args = parser.parse_args(argv)

    paths = find_images(args.images)
    targets = [args.out / f"{path.stem}.png" for path in paths]
    refuse_to_overwrite(targets)
    model, dataset = load_detector_model(args.weights)
    detector = Detector(model, args.score, args.decoder)
    names = DATASETS[dataset].classes
    args.out.mkdir(parents=True, exist_ok=True)
    for path, target in zip(paths, targets, strict=True):
        image = read_image(path)
        (boxes,) = detector.detect([image])
        enlarge = math.ceil(LEAST_WIDTH / image.shape[2])
        draw_boxes(image, boxes, names, enlarge).save(target)
        print(f"{path}: {in_words(boxes, names, args.score)} -> {target}", flush=True)
    return 0


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
        if path.is_dir():
            paths += sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_ENDINGS)
        elif path.is_file():
            paths.append(path)
        else:
            raise InputError(f"There is no image or folder {path}: name one that is there.")
    if not paths:
        raise InputError("There is no image in the folders named: name others, or image files.")
    return paths


def refuse_to_overwrite(targets: Sequence[Path]) -> None:
    names = [target.name for target in targets]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise InputError(f"Two images would both be drawn to {doubled}: predict them one after the other.")
    existing = next((target for target in targets if target.exists()), None)
    if existing is not None:
        raise InputError(f"{existing} is already there: name another folder with --out.")


if __name__ == "__main__":
    sys.exit(main())
