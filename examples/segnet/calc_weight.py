#!/usr/bin/env python3
"""Writes the weights with which train.py balances the classes of CamVid: median frequency over frequency."""

from __future__ import annotations

import ada_loss.chainer  # noqa: F401  isort: skip  (has to come before Chainer)

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from camvid_data import N_CLASS, find_data, open_split, read
from command_options import example_parser
from errors import InputError, ends_cleanly


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = example_parser(__doc__)
    parser.add_argument("--dataset", choices=("camvid", "digits"), default="camvid", help="whose classes")
    parser.add_argument("--data-dir", type=Path, help="folder with train.txt")
    parser.add_argument("--out", type=Path, default=Path("class_weight.npy"), help="where the weights go")
    options = parser.parse_args(argv)
    weights = class_weights(open_split(find_data(options.dataset, options.data_dir), "train"))
    try:
        with open(options.out, "wb") as file:
            np.save(file, weights)
    except OSError as error:
        raise InputError(f"{options.out} can't be written ({error.strerror}): use --out.") from None
    print(" ".join(f"{weight:.3f}" for weight in weights), f"| {options.out}")
    return 0


def class_weights(images: Any) -> np.ndarray:
    """For each class the median of all frequencies over its own, float32.

    A class's frequency is its share of the pixels of the images that show it (Eigen and Fergus, 2015); one
    that no image shows has the weight 0.
    """
    of_class, of_images = np.zeros(N_CLASS), np.zeros(N_CLASS)
    for index in range(len(images)):
        _, label = read(images, index)
        counts = np.bincount(label[label >= 0], minlength=N_CLASS)
        of_class += counts
        of_images[counts > 0] += label.size
    frequency = of_class / np.maximum(of_images, 1)
    median = np.median(frequency[frequency > 0])
    return np.divide(median, frequency, out=np.zeros(N_CLASS), where=frequency > 0).astype(np.float32)


if __name__ == "__main__":
    sys.exit(main())
