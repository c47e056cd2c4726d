#!/usr/bin/env python3
"""Draws the objects that a trained SSD finds in images; see --help."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from arguments import share
from data_voc import read_image
from datasets import DATASETS
from detector import DRAWING_THRESH, Detector
from drawing import draw_boxes
from errors import InputError, ends_cleanly
from saved import load_detector_model, weights_parser

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}
MOST_NAMED = 5


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
        draw_boxes(image, boxes, names).save(target)
        best = [f"{names[label]} {score:.2f}" for _, label, score in zip(*boxes, strict=True)][:MOST_NAMED]
        print(f"{path}: {len(boxes.score)} objects ({', '.join(best)}) -> {target}", flush=True)
    return 0


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
