#!/usr/bin/env python3
"""Prints the mean average precision (PASCAL VOC 2007 metric) of a trained SSD; see --help."""

from __future__ import annotations

from ada_loss.chainer import kernels  # isort: skip  (has to come before Chainer)

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_voc import JoinedDatasets
from datasets import DATASETS, DatasetKind
from errors import InputError, SharedInputError, caution, ends_cleanly
from evaluation import evaluate, mean_precision
from options import add_test_batchsize
from ranks import start_ranks
from saved import detector_of, load_detector_model, weights_parser


@ends_cleanly
@kernels.using("auto")
def main(argv: Sequence[str] | None = None) -> int:
    parser = weights_parser("Print the mean average precision of a trained SSD, PASCAL VOC 2007 metric.")
    parser.add_argument("--dataset", choices=DATASETS, help="its test images; those of the model's classes")
    parser.add_argument(
        "--dataset-dir", type=Path, help="folder with VOC2007, or where the digits are already"
    )
    add_test_batchsize(parser)
    args = parser.parse_args(argv)

    ranks = start_ranks()
    with ranks.ending_together():
        model, dataset = ranks.rank_0_first(lambda: load_detector_model(args.weights))
        if args.dataset not in (None, dataset):
            raise SharedInputError(f"{args.weights} knows the classes of {dataset}: use --dataset {dataset}.")
        kind = DATASETS[dataset]
        test_set = ranks.rank_0_first(lambda: open_existing(kind, args.dataset_dir))
        began = time.monotonic()
        detector = replace(detector_of(model, args), batch_size=args.test_batchsize)
        precisions = evaluate(detector, test_set, ranks)
        seconds = time.monotonic() - began
    if precisions is not None:
        for name, precision in zip(kind.classes, precisions, strict=True):
            print(f"{name:>12}  {'-' if np.isnan(precision) else f'{precision:.4f}'}")
        mean = mean_precision(precisions)
        print(f"{'mAP':>12}  {'-' if mean is None else f'{mean:.4f}'}")
        if mean is None:
            caution("no test image shows an object that counts, so that there is no mAP.")
        print(f"{len(test_set)} images in {seconds:.1f} s", file=sys.stderr)
    return 0


def open_existing(kind: DatasetKind, folder: Path | None) -> JoinedDatasets:
    """Test images. A digits set makes itself in its usual place only: a folder that is named has to exist."""
    if folder is not None and not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}: name one that train_multi.py was given with --dataset-dir, which "
            "makes a digits set there, or leave the option out."
        )
    return kind.open_test(folder)


if __name__ == "__main__":
    sys.exit(main())
