"""The options of train_multi.py."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from ada_loss.chainer.kernels import PROVIDERS
from ada_loss.core.config import METHODS, TIMINGS, AdaLossConfig
from coding import MATCH_THRESHOLD, VARIANCES
from command_line import (
    Former,
    HelpFormatter,
    OneSentenceParser,
    count,
    count_or_zero,
    device,
    number,
    number_or_none,
    positive,
    power_of_two,
    share,
    whole_number,
)
from datasets import DATASETS
from detector import DECODERS, MOST_BOXES, NMS_THRESHOLD, TEST_BATCHSIZE
from loss import LOSS_NORMS, NEGATIVES_PER_POSITIVE
from models import INITIALIZERS, MODELS
from ranks import COMMUNICATORS
from recipes import ORIGINAL_RECIPE, SMALL_RECIPE

DTYPES = ("float32", "mixed16", "float16")
# What the flags of the paper's own code became.
FORMER = {
    "--np": "start N ranks with mpiexec -n N in front of python3",
    "--snapshot-per-n-iteration": "write --checkpoint-interval N",
    "--sanity-check": "leave it out, since gradients that are not finite are looked for in every step",
    "--use-fp32-update": "leave it out, since float16 weights always have float32 masters",
    "--profiling": "leave it out, and write python3 -m cProfile -o FILE train_multi.py ... for a profile",
}


def training_parser() -> OneSentenceParser:
    parser = OneSentenceParser(
        description="Train SSD with adaptive loss scaling; alone, or on several ranks behind mpiexec -n N.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", choices=MODELS, default="small", help="small trains on two CPU cores")
    add("--dataset", choices=DATASETS, help=f"what to train on {_by_model('dataset')}")
    add(
        "--dataset-dir",
        type=Path,
        help="folder with VOC2007 and VOC2012, or where the digits are (made if missing)",
    )
    add("--model-dir", type=Path, help="folder with ImageNet weights; where ChainerCV keeps its models")
    add("--pretrained", metavar="imagenet|none|PATH", help=f"initial weights {_by_model('pretrained')}")
    add(
        "--initializer",
        choices=INITIALIZERS,
        default="lecun-uniform",
        help="of the layers added to the backbone",
    )
    add(
        "--match-threshold",
        type=share,
        default=MATCH_THRESHOLD,
        help="overlap from which on a default box learns an object",
    )
    add(
        "--match-ties",
        action="store_true",
        help="so does, as in GluonCV, one that overlaps it exactly as much as its best",
    )
    add(
        "--variances",
        type=positive,
        nargs=2,
        default=VARIANCES,
        metavar=("CENTRE", "SIZE"),
        help="what offsets of centres and sizes are divided by",
    )
    add_detection_options(parser)
    add_test_batchsize(parser)

    add = parser.add_argument_group("mixed precision").add_argument
    add("--dtype", choices=DTYPES, default="mixed16", help="float32 trains without any loss scaling")
    add(
        "--loss-scale-method",
        choices=METHODS,
        default=AdaLossConfig.loss_scale_method,
        help="how layers choose their scales; in fixed they have none",
    )
    add("--init-scale", type=number, default=1.0, help="scale of the loss, a power of two")
    add(
        "--dynamic-interval",
        type=whole_number,
        help="double the scale after so many good steps, halve it on overflow",
    )
    add(
        "--update-per-n-iteration",
        type=whole_number,
        default=1,
        help="layers choose their scales every so many iterations",
    )
    add("--timing", choices=TIMINGS, default="current", help="choose by this step's gradients or the last's")
    add("--scale-upper-bound", type=number_or_none, default=16.0, help="most that a layer scales by, or none")
    add(
        "--accum-upper-bound",
        type=number_or_none,
        default=1024.0,
        help="most that layers together scale by, or none",
    )
    add("--n-uf", type=number, default=1e-3, help="share of a layer's gradients that may underflow")

    add = parser.add_argument_group("training").add_argument
    add("--batchsize", type=count, help=f"images of an iteration, over all ranks {_by_model('batchsize')}")
    add("--iteration", type=count, help=f"number of iterations {_by_model('iteration')}")
    add("--lr", type=positive, help=f"learning rate {_by_model('lr')}")
    add(
        "--step",
        type=count,
        nargs="*",
        help="iterations after which the learning rate falls to a tenth (default: four fifths of all for "
        "small, two thirds and five sixths for the others)",
    )
    add(
        "--warm-up",
        type=count_or_zero,
        help="iterations over which the learning rate rises from a tenth (default: 50 for small, 1000 for "
        "the others, 0 with their batch size of 32)",
    )
    add("--alpha", type=positive, default=1.0, help="weight of the loss of the offsets")
    add(
        "--negative-ratio",
        type=count_or_zero,
        default=NEGATIVES_PER_POSITIVE,
        help="most background boxes in the loss for each box with an object",
    )
    add(
        "--loss-norm",
        choices=LOSS_NORMS,
        default="batch",
        help="divide the loss by the positives of the batch or image",
    )
    add(
        "--loss-multiplier",
        type=power_of_two,
        default=1.0,
        help="an experiment: gradients flow this much larger",
    )
    add("--seed", type=count_or_zero, default=0, help="of initial weights, order of images and augmentation")

    add = parser.add_argument_group("running").add_argument
    add(
        "--out",
        type=Path,
        default=Path("result"),
        help="folder for logs, checkpoints, weights and result.json",
    )
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint, or from the newest one in --out")
    add(
        "--device",
        type=device,
        default="auto",
        metavar="auto|cpu|gpu|N",
        help="auto is a GPU if there is one",
    )
    add("--kernels", choices=PROVIDERS, default="auto", help="what computes convolutions and the like")
    add("--communicator", choices=COMMUNICATORS, default="auto", help="of ChainerMN, behind mpiexec")
    add(
        "--loaders",
        type=count_or_zero,
        help=f"processes that prepare images; 0 for none {_by_model('loaders')}",
    )
    add("--log-interval", type=count, default=20, help="iterations between rows of the log")
    add(
        "--evaluation-interval",
        type=count,
        help="iterations between evaluations, besides those at the steps of the learning rate and at the end",
    )
    add("--checkpoint-interval", type=count, default=1000, help="iterations between checkpoints")
    add(
        "--record-interval",
        type=count_or_zero,
        default=100,
        help="iterations between records of all gradients, for python -m ada_loss.report; 0 for none",
    )
    add("--tensorboard", action="store_true", help="also write what TensorBoard reads")
    add("--no-check", action="store_false", dest="check", help="begin without looking through the data set")
    for name, advice in FORMER.items():
        flags = (name, name.replace("--", "--no", 1))
        parser.add_argument(*flags, action=Former, advice=advice, dest="former")
    return parser


def add_detection_options(parser: ArgumentParser) -> None:
    """Options that say how a network's outputs become boxes."""
    add = parser.add_argument_group("detection").add_argument
    add("--decoder", choices=DECODERS, default=DECODERS[0], help="how scores become boxes")
    add(
        "--nms-threshold",
        type=share,
        default=NMS_THRESHOLD,
        help="overlap from which on the less sure of two boxes of a class is left out",
    )
    add("--top-k", type=count, default=MOST_BOXES, help="most boxes that are found in an image")


def add_test_batchsize(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--test-batchsize", type=count, default=TEST_BATCHSIZE, help="images that are evaluated at a time"
    )


def _by_model(option: str) -> str:
    small, others = getattr(SMALL_RECIPE, option), getattr(ORIGINAL_RECIPE, option)
    return f"(default: {small} for small, {others} for the others)"
