"""Detectors from files of weights, for predict.py and evaluate.py: ours and ChainerCV's own."""

from __future__ import annotations

import argparse
from pathlib import Path

import chainer
from chainercv.links.model.ssd import SSD

from command_line import OneSentenceParser
from datasets import dataset_with_classes
from detector import EVALUATION_THRESH, Detector
from models import build_model
from options import add_detection_options
from weights import identify, load_weights


def weights_parser(description: str) -> argparse.ArgumentParser:
    """A command line that starts with a file of weights."""
    parser = OneSentenceParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="model.npz of a training run, or a file of ChainerCV's")
    add_detection_options(parser)
    return parser


def detector_of(model: SSD, args: argparse.Namespace, score_thresh: float = EVALUATION_THRESH) -> Detector:
    """A detector with the options of such a command line."""
    return Detector(model, score_thresh, args.decoder, args.nms_threshold, args.top_k)


def load_detector_model(path: Path) -> tuple[SSD, str]:
    """A model with a file's weights, in their dtype, and the name of the data set whose classes it knows.

    Which model it is shows in the file. Raises InputError if that is not one of ours.
    """
    held = identify(path)
    dataset = dataset_with_classes(held.n_fg_class)
    with chainer.using_config("dtype", held.dtype):
        model = build_model(held.model, held.n_fg_class, "lecun-uniform", seed=0, variances=held.variances)
    load_weights(path, model)
    return model, dataset
