#!/usr/bin/env python3
"""Prints the mean average precision (PASCAL VOC 2007's metric, or COCO's) of a trained SSD; see --help."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_coco import COCO_CLASSES, CocoDataset, labels_in_coco
from data_voc import JoinedDatasets
from datasets import COCO, DATASETS, class_names
from errors import InputError, SharedInputError, caution, ends_cleanly
from evaluation import average_precisions, coco_precisions, detect_in, mean_precision, require_pycocotools
from options import add_test_batchsize
from ranks import start_ranks
from saved import detector_of, load_detector_model, weights_parser


@ends_cleanly
@kernels.using("auto")
def main(argv: Sequence[str] | None = None) -> int:
    parser = weights_parser(
        "Print the mean average precision of a trained SSD, by PASCAL VOC's or COCO's rules."
    )
    parser.add_argument(
        "--dataset",
        choices=(*DATASETS, COCO),
        help="its test images; those of the model's classes, or coco for a model of voc's",
    )
    parser.add_argument(
        "--dataset-dir", type=Path, help="folder with VOC2007 or COCO, or where the digits are already"
    )
    add_test_batchsize(parser)
    args = parser.parse_args(argv)

    ranks = start_ranks()
    with ranks.ending_together():
        model, trained_on = ranks.rank_0_first(lambda: load_detector_model(args.weights))
        name = args.dataset or trained_on
        labels = labels_in_coco(model.n_fg_class)
        if name != trained_on and not (name == COCO and labels is not None):
            raise SharedInputError(
                f"{args.weights} knows the classes of {trained_on}: use --dataset {trained_on}."
            )
        if name == COCO:
            ranks.together(require_pycocotools)
        test_set = ranks.rank_0_first(lambda: open_existing(name, args.dataset_dir))
        began = time.monotonic()
        detector = replace(detector_of(model, args), batch_size=args.test_batchsize)
        results = detect_in(detector, test_set, ranks)
        seconds = time.monotonic() - began
    if results and name == COCO:
        names = [COCO_CLASSES[label] for label in labels]
        show(names, coco_precisions(results, labels))
    elif results:
        show(class_names(name), {"": average_precisions(results, model.n_fg_class)})
    if results:
        print(f"{len(test_set)} images in {seconds:.1f} s", file=sys.stderr)
    return 0


def show(names: Sequence[str], precisions: Mapping[str, np.ndarray]) -> None:
    """Print a line for each class and the mean, with a column for each overlap where there are several."""
    width = max(12, *map(len, names))
    if len(precisions) > 1:
        print(f"{'overlap':>{width}}" + "".join(f"  {overlap:>9}" for overlap in precisions))
    means = [mean_precision(column) for column in precisions.values()]
    for name, *row in [*zip(names, *precisions.values(), strict=True), ("mAP", *means)]:
        cells = ("-" if cell is None or np.isnan(cell) else f"{cell:.4f}" for cell in row)
        print(f"{name:>{width}}" + "".join(f"  {cell:>{6 if len(row) == 1 else 9}}" for cell in cells))
    if None in means:
        caution("no test image shows an object that counts, so that there is no mAP.")


def open_existing(name: str, folder: Path | None) -> JoinedDatasets | CocoDataset:
    """Test images. A digits set makes itself in its usual place only: a folder that is named has to exist."""
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}: name one that train_multi.py was given with --dataset-dir, which "
            "makes a digits set there, or leave the option out."
        )
    return CocoDataset.open(folder) if name == COCO else DATASETS[name].open_test(folder)


if __name__ == "__main__":
    sys.exit(main())
