"""Options that every example has, and what they stand for: precision, loss scaling, where a run writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import chainer
import numpy as np

from ada_loss.chainer.kernels import PROVIDERS
from ada_loss.core.config import METHODS, AdaLossConfig
from ada_loss.core.rules import RULES
from command_line import (
    HelpFormatter,
    OneSentenceParser,
    count_or_zero,
    device,
    flag,
    number,
    number_or_none,
    whole_number,
)
from errors import SharedInputError
from ranks import COMMUNICATORS

DTYPES = {"float32": np.dtype(np.float32), "mixed16": chainer.mixed16, "float16": np.dtype(np.float16)}


def example_parser(description: str | None) -> OneSentenceParser:
    """A command line of an example, without options yet."""
    return OneSentenceParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_scaling_options(parser: argparse.ArgumentParser, dtype: str, **defaults: Any) -> None:
    """Add the options of mixed precision.

    Args:
        parser: takes them.
        dtype: default of `--dtype`.
        defaults: fields of `AdaLossConfig` whose defaults are others in this example.
    """
    config = AdaLossConfig(**defaults)
    add = parser.add_argument_group("mixed precision").add_argument
    add("--dtype", choices=DTYPES, default=dtype, help="float32 trains without any loss scaling")
    add(
        "--loss-scale-method",
        "--method",
        choices=METHODS,
        default=config.loss_scale_method,
        help="how layers choose their scales; in fixed they have none",
    )
    add("--init-scale", "--loss_scale", type=number, default=config.init_scale, help="a power of two")
    add(
        "--dynamic-interval",
        type=whole_number,
        help="double the scale after so many good steps, halve on overflow",
    )
    add(
        "--update-per-n-iteration",
        "--update_per_n_iteration",
        type=whole_number,
        default=config.update_per_n_iteration,
        help="layers choose their scales every so many iterations",
    )
    add(
        "--scale-upper-bound",
        type=number_or_none,
        default=config.scale_upper_bound,
        help="most that a layer scales by, or none",
    )
    add(
        "--accum-upper-bound",
        type=number_or_none,
        default=config.accum_upper_bound,
        help="most that layers together scale by, or none",
    )
    add("--n-uf", type=number, default=config.n_uf, help="share of a layer's gradients that may underflow")


def add_run_options(parser: argparse.ArgumentParser, out: str, seed: int | None) -> None:
    """Add the options of where and how a run computes and writes; `out` and `seed` are defaults."""
    add = parser.add_argument_group("the run").add_argument
    add("--out", type=Path, default=Path(out), help="folder for results; made if missing")
    add("--resume", metavar="auto|FOLDER", help="go on from --out's newest checkpoint, or from one named")
    add("--manual-seed", "--manual_seed", type=count_or_zero, default=seed, help="of weights and order")
    add("--communicator", choices=COMMUNICATORS, default="auto", help="ChainerMN's, behind mpiexec -n N")
    add("--kernels", choices=PROVIDERS, default="auto", help="who computes convolutions on a CPU")
    add("--device", "--gpu", type=_device, default="auto", help="auto, cpu, gpu, or a GPU's number")


def scaling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `AdaLossScaled` on a command line; raises InputError if they make no sense."""
    names = ("loss_scale_method", "init_scale", "dynamic_interval", "update_per_n_iteration")
    names += ("scale_upper_bound", "accum_upper_bound", "n_uf")
    values = {name: getattr(options, name) for name in names}
    try:
        AdaLossConfig(**values)
    except ValueError as error:
        message = str(error)
        for name in sorted(names, key=len, reverse=True):
            message = message.replace(name, flag(name))
        raise SharedInputError(message) from None
    return values


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run has to share with the one that it goes on with, as JSON holds it."""
    free = (
        "epoch",
        "iter",
        "val_iter",
        "snapshot_freq",
        "out",
        "resume",
        "communicator",
        "device",
        "kernels",
        "loaderjob",
        "data_dir",
        "dataset_dir",
        "verbose",
    )
    values = {name: value for name, value in vars(options).items() if name not in free}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def scaling_name(options: argparse.Namespace) -> str:
    """The loss scaling of a run in a few words."""
    if options.dtype == "float32":
        return "float32"
    if RULES[options.loss_scale_method].measures:
        every = options.update_per_n_iteration
        return options.loss_scale_method + (f", chosen every {every} iterations" if every > 1 else "")
    if options.dynamic_interval is not None:
        return f"dynamic, interval {options.dynamic_interval}"
    return "no loss scale" if options.init_scale == 1 else f"fixed {options.init_scale:g}"


def _device(text: str) -> str:
    """A type for argparse; -1 is how the paper's code names the CPU."""
    return "cpu" if text == "-1" else device(text)
