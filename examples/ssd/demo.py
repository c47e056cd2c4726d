#!/usr/bin/env python3
"""Trains the small SSD adaptively in mixed precision, prints its mAP and draws what it finds."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image
from PIL.Image import open as open_image

import train_multi
from ada_loss.report.facts import lines, load
from command_line import OneSentenceParser
from data_voc import JoinedDatasets
from datasets import DATASETS
from detector import Detector
from drawing import above, draw_boxes, tile
from errors import ends_cleanly
from output import RESULT_FILE, alone_in
from saved import load_detector_model
from training import WEIGHTS_FILE

OUT = Path(__file__).resolve().parent / "out" / "demo"
TRAINING = ("--model", "small", "--dtype", "mixed16", "--loss-scale-method", "auto")
# Boxes less sure than this are left out of the picture.
SCORE = 0.5
COLUMNS, ROWS, ENLARGEMENT = 4, 3, 3


@ends_cleanly
@kernels.using("auto")
def main(argv: Sequence[str] | None = None) -> int:
    parser = OneSentenceParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="where the picture goes")
    parser.add_argument("--dataset-dir", type=Path, help="where the digits are, or are made")
    parser.add_argument("--iteration", default="1500", help="number of iterations")
    args = parser.parse_args(argv)

    began = time.monotonic()
    if OUT.exists():
        # Only demonstrations write here; one may be at it now.
        with alone_in(OUT):
            shutil.rmtree(OUT, ignore_errors=True)
    data = ("--dataset-dir", str(args.dataset_dir)) if args.dataset_dir else ()
    status = train_multi.main([*TRAINING, *data, "--iteration", args.iteration, "--out", str(OUT)])
    if status:
        return status
    result = json.loads((OUT / RESULT_FILE).read_text())
    if result["outcome"] != "finished":
        return 1
    model, dataset = load_detector_model(OUT / WEIGHTS_FILE)
    kind = DATASETS[dataset]
    found = draw_detections(Detector(model, SCORE), kind.open_test(args.dataset_dir), kind.classes)
    windows = draw_windows(OUT)
    (found if windows is None else above(found, windows)).save(args.picture)
    print(
        f"mAP {result['map']:.4f} on test images (VOC 2007 metric); some of them, with boxes, are in "
        f"{args.picture}{'' if windows is None else ', above the scales that suit each layer'}. It took "
        f"{time.monotonic() - began:.0f} s."
    )
    return 0


def draw_windows(out: Path) -> Image | None:
    """For each layer of a run the single scales that would do for its gradients; None without the packages of
    the report."""
    try:
        from ada_loss.report.pictures import to_png
        from ada_loss.report.window_chart import window_chart
    except ImportError:
        return None
    (run,) = load([out])
    chart = window_chart(run, lines(run, [run]))
    return open_image(io.BytesIO(to_png(chart, run.sentence, "The scales that suit each layer's gradients")))


def draw_detections(detector: Detector, dataset: JoinedDatasets, names: Sequence[str]) -> Image:
    """The first images of a data set with the boxes that are found in them."""
    images = [dataset.image(i) for i in range(COLUMNS * ROWS)]
    found = detector.detect(images)
    pictures = [
        draw_boxes(image, boxes, names, ENLARGEMENT) for image, boxes in zip(images, found, strict=True)
    ]
    return tile(pictures, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
