"""Command line of train_multi.py."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ada_loss.chainer.kernels import PROVIDERS
from ada_loss.core.config import METHODS, TIMINGS, AdaLossConfig
from datasets import DATASETS
from detector import DECODERS
from errors import BAD_INPUT, SharedInputError, launched_rank
from loss import LOSS_NORMS
from models import INITIALIZERS, MODELS
from ranks import COMMUNICATORS

DTYPES = ("float32", "mixed16", "float16")
DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained where the command line does not say.

    Attributes:
        dataset, pretrained, batchsize, lr, iteration, loaders: defaults of the options of these names.
        steps: shares of the iterations after which the learning rate falls to a tenth.
        warm_up: default of the option of this name, unless the batch size is `plain_batchsize`.
    """

    dataset: str
    pretrained: str
    batchsize: int
    lr: float
    iteration: int
    steps: tuple[float, ...]
    warm_up: int
    plain_batchsize: int | None
    loaders: int


ORIGINAL_RECIPE = Recipe(
    dataset="voc",
    pretrained="imagenet",
    batchsize=32,
    lr=1e-3,
    iteration=120_000,
    steps=(2 / 3, 5 / 6),
    warm_up=1000,
    plain_batchsize=32,
    loaders=4,
)
SMALL_RECIPE = Recipe(
    dataset="digits",
    pretrained="none",
    batchsize=8,
    lr=6e-3,
    iteration=1500,
    steps=(0.8,),
    warm_up=50,
    plain_batchsize=None,
    loaders=0,
)
RECIPES = {"small": SMALL_RECIPE, "ssd300": ORIGINAL_RECIPE, "ssd512": ORIGINAL_RECIPE}

SCALING_FIELDS = (
    "loss_scale_method",
    "init_scale",
    "dynamic_interval",
    "update_per_n_iteration",
    "timing",
    "scale_upper_bound",
    "accum_upper_bound",
    "n_uf",
)
# What a resumed run may change, because the numbers do not depend on it: where things are, what is shown, and
# how training goes on from here. Everything else is part of the run.
FREE_ON_RESUME = (
    "dataset_dir",
    "model_dir",
    "pretrained",
    "decoder",
    "communicator",
    "device",
    "loaders",
    "out",
    "resume",
    "log_interval",
    "checkpoint_interval",
    "tensorboard",
    "iteration",
    "step",
    "lr",
    "warm_up",
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, complete and checked; each field is an option of `--help`."""

    model: str
    dataset: str
    dataset_dir: Path | None
    model_dir: Path | None
    pretrained: str
    dtype: str
    initializer: str
    loss_norm: str
    loss_multiplier: float
    decoder: str
    loss_scale_method: str
    init_scale: float
    dynamic_interval: int | None
    update_per_n_iteration: int
    timing: str
    scale_upper_bound: float | None
    accum_upper_bound: float | None
    n_uf: float
    batchsize: int
    lr: float
    iteration: int
    step: tuple[int, ...]
    warm_up: int
    seed: int
    communicator: str
    device: str
    kernels: str
    loaders: int
    out: Path
    resume: str | None
    log_interval: int
    checkpoint_interval: int
    tensorboard: bool

    @property
    def scaling(self) -> dict[str, Any]:
        """The settings of `AdaLossScaled`."""
        return {name: getattr(self, name) for name in SCALING_FIELDS}

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def numerics(self) -> dict[str, Any]:
        """The settings that a resumed run has to share."""
        return {name: value for name, value in self.as_json().items() if name not in FREE_ON_RESUME}


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """The settings on a command line. Ends the process, or raises InputError, if they make no sense."""
    values = vars(_parser().parse_args(argv))
    recipe = RECIPES[values["model"]]
    for name in ("dataset", "pretrained", "batchsize", "lr", "iteration", "loaders"):
        if values[name] is None:
            values[name] = getattr(recipe, name)
    if values["step"] is None:
        values["step"] = [round(values["iteration"] * share) for share in recipe.steps]
    values["step"] = tuple(sorted(set(values["step"])))
    if values["warm_up"] is None:
        values["warm_up"] = 0 if values["batchsize"] == recipe.plain_batchsize else recipe.warm_up
    settings = Settings(**values)
    _check_scaling(settings)
    if settings.pretrained == "imagenet" and not MODELS[settings.model].on_vgg:
        raise SharedInputError(
            f"There are no ImageNet weights for --model {settings.model}: use --pretrained none."
        )
    return settings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that there are; None stands for none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class OneSentenceParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, once, however many ranks read the same command line."""

    def error(self, message: str) -> NoReturn:
        if launched_rank() == 0:
            print(f"error: {message}; see --help.", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
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
    add("--decoder", choices=DECODERS, default="per-class", help="how scores become boxes in evaluation")

    add = parser.add_argument_group("mixed precision").add_argument
    add("--dtype", choices=DTYPES, default="mixed16", help="float32 trains without any loss scaling")
    add(
        "--loss-scale-method",
        choices=METHODS,
        default=AdaLossConfig.loss_scale_method,
        help="how layers choose their scales; in fixed they have none",
    )
    add("--init-scale", type=_number, default=1.0, help="scale of the loss, a power of two")
    add(
        "--dynamic-interval", type=int, help="double the scale after so many good steps, halve it on overflow"
    )
    add(
        "--update-per-n-iteration",
        type=int,
        default=1,
        help="layers choose their scales every so many iterations",
    )
    add("--timing", choices=TIMINGS, default="current", help="choose by this step's gradients or the last's")
    add(
        "--scale-upper-bound", type=_number_or_none, default=16.0, help="most that a layer scales by, or none"
    )
    add(
        "--accum-upper-bound",
        type=_number_or_none,
        default=1024.0,
        help="most that layers together scale by, or none",
    )
    add("--n-uf", type=float, default=1e-3, help="share of a layer's gradients that may underflow")

    add = parser.add_argument_group("training").add_argument
    add("--batchsize", type=count, help=f"images of an iteration, over all ranks {_by_model('batchsize')}")
    add("--iteration", type=count, help=f"number of iterations {_by_model('iteration')}")
    add("--lr", type=_positive, help=f"learning rate {_by_model('lr')}")
    add(
        "--step",
        type=count,
        nargs="*",
        help="iterations after which the learning rate falls to a tenth (default: four fifths of all for "
        "small, two thirds and five sixths for the others)",
    )
    add(
        "--warm-up",
        type=_count_or_zero,
        help="iterations over which the learning rate rises from a tenth (default: 50 for small, 1000 for "
        "the others, 0 with their batch size of 32)",
    )
    add(
        "--loss-norm",
        choices=LOSS_NORMS,
        default="batch",
        help="divide the loss by the positives of the batch or image",
    )
    add(
        "--loss-multiplier",
        type=_power_of_two,
        default=1.0,
        help="an experiment: gradients flow this much larger",
    )
    add("--seed", type=_count_or_zero, default=0, help="of initial weights, order of images and augmentation")

    add = parser.add_argument_group("running").add_argument
    add(
        "--out",
        type=Path,
        default=Path("result"),
        help="folder for logs, checkpoints, weights and result.json",
    )
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint, or from the newest one in --out")
    add("--device", choices=DEVICES, default="auto", help="auto is a GPU if there is one")
    add("--kernels", choices=PROVIDERS, default="auto", help="what computes convolutions and the like")
    add("--communicator", choices=COMMUNICATORS, default="auto", help="of ChainerMN, behind mpiexec")
    add(
        "--loaders",
        type=_count_or_zero,
        help=f"processes that prepare images; 0 for none {_by_model('loaders')}",
    )
    add("--log-interval", type=count, default=20, help="iterations between rows of the log")
    add("--checkpoint-interval", type=count, default=1000, help="iterations between checkpoints")
    add("--tensorboard", action="store_true", help="also write what TensorBoard reads")
    return parser


def _by_model(option: str) -> str:
    small, others = getattr(SMALL_RECIPE, option), getattr(ORIGINAL_RECIPE, option)
    return f"(default: {small} for small, {others} for the others)"


def _check_scaling(settings: Settings) -> None:
    try:
        AdaLossConfig(**settings.scaling)
    except ValueError as error:
        message = str(error)
        for name in sorted(SCALING_FIELDS, key=len, reverse=True):
            message = message.replace(name, "--" + name.replace("_", "-"))
        raise SharedInputError(message) from None


def _checked(
    convert: Callable[[str], Any], accept: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """A type for argparse that takes some values only."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


count = _checked(int, lambda value: value >= 1, "a whole number of at least 1")
_count_or_zero = _checked(int, lambda value: value >= 0, "a whole number of at least 0")
share = _checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_positive = _checked(float, lambda value: 0 < value < math.inf, "a positive number")
_power_of_two = _checked(
    lambda text: _number(text),
    lambda value: 0 < value < math.inf and math.frexp(value)[0] == 0.5,
    "a power of two such as 0.5 or 2**-12",
)


def _number(text: str) -> float:
    """Also accepts powers of two as one would write them, 2**-12."""
    return 2.0 ** int(text[3:]) if text.startswith("2**") else float(text)


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _number(text)
