"""Command line of train_multi.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ada_loss.core.config import AdaLossConfig
from command_line import flag
from errors import SharedInputError
from models import MODELS
from options import training_parser
from recipes import RECIPES

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
    "nms_threshold",
    "top_k",
    "test_batchsize",
    "check",
    "communicator",
    "device",
    "loaders",
    "out",
    "resume",
    "log_interval",
    "evaluation_interval",
    "checkpoint_interval",
    "record_interval",
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
    match_threshold: float
    match_ties: bool
    variances: tuple[float, float]
    alpha: float
    negative_ratio: int
    loss_norm: str
    loss_multiplier: float
    decoder: str
    nms_threshold: float
    top_k: int
    test_batchsize: int
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
    evaluation_interval: int | None
    checkpoint_interval: int
    record_interval: int
    tensorboard: bool
    check: bool

    @property
    def scaling(self) -> dict[str, Any]:
        """The settings of `AdaLossScaled`."""
        return {name: getattr(self, name) for name in SCALING_FIELDS}

    def as_json(self) -> dict[str, Any]:
        plain = {Path: str, tuple: list}
        values = asdict(self)
        return {
            name: next((convert(value) for kind, convert in plain.items() if isinstance(value, kind)), value)
            for name, value in values.items()
        }

    def numerics(self) -> dict[str, Any]:
        """The settings that a resumed run has to share."""
        return {name: value for name, value in self.as_json().items() if name not in FREE_ON_RESUME}


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """The settings on a command line. Ends the process, or raises InputError, if they make no sense."""
    values = vars(training_parser().parse_args(argv))
    recipe = RECIPES[values["model"]]
    for name in ("dataset", "pretrained", "batchsize", "lr", "iteration", "loaders"):
        if values[name] is None:
            values[name] = getattr(recipe, name)
    if values["step"] is None:
        values["step"] = [round(values["iteration"] * share) for share in recipe.steps]
    values["step"] = tuple(sorted(set(values["step"])))
    if values["warm_up"] is None:
        values["warm_up"] = 0 if values["batchsize"] == recipe.plain_batchsize else recipe.warm_up
    values["variances"] = tuple(values["variances"])
    settings = Settings(**values)
    _check_scaling(settings)
    if settings.pretrained == "imagenet" and not MODELS[settings.model].on_vgg:
        raise SharedInputError(
            f"There are no ImageNet weights for --model {settings.model}: use --pretrained none."
        )
    return settings


def _check_scaling(settings: Settings) -> None:
    try:
        AdaLossConfig(**settings.scaling)
    except ValueError as error:
        message = str(error)
        for name in sorted(SCALING_FIELDS, key=len, reverse=True):
            message = message.replace(name, flag(name))
        raise SharedInputError(message) from None
