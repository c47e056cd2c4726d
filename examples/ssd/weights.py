"""Files of weights, ours, ChainerCV's, and VGG-16's from ImageNet: .npz with a model's paths as keys."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from chainer.backends import cuda
from chainer.dataset.download import get_dataset_root
from chainercv.links import SSD300
from chainercv.links.model.ssd import SSD
from chainercv.utils import download_model

from coding import VARIANCES
from errors import InputError
from files import flush_to_disk
from models import BOXES_IN_FIRST_CELLS

IMAGENET_URL = SSD300._models["imagenet"]["url"]
# One convolution of each model that the others do not have.
MODEL_MARKS = {
    "extractor/conv12_1/W": "ssd512",
    "extractor/conv11_1/W": "ssd300",
    "extractor/conv6/W": "small",
}
FIRST_HEAD = "multibox/conf/0/b"
VARIANCES_KEY = "variances"


def find_pretrained(pretrained: str, model_dir: Path | None) -> Path | None:
    """The file to start from: VGG-16's weights for "imagenet", none for "none", otherwise the one named."""
    if pretrained == "imagenet":
        return find_imagenet(model_dir)
    return None if pretrained == "none" else Path(pretrained)


def find_imagenet(model_dir: Path | None) -> Path:
    """The file of VGG-16's weights: in the folder given, or where ChainerCV keeps its models."""
    folder = model_dir or Path(get_dataset_root()) / "pfnet" / "chainercv" / "models"
    path = folder / os.path.basename(IMAGENET_URL)
    if path.exists():
        return path
    reason = "it is not there"
    if model_dir is None:
        try:
            return Path(download_model(IMAGENET_URL))
        except OSError as error:
            reason = str(error)
    raise InputError(
        f"The ImageNet weights {path.name} can't be had ({reason}): put that file, which is at "
        f"{IMAGENET_URL}, into {folder}, or start without them with --pretrained none."
    )


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. Raises InputError if it is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no .npz file, or a damaged one"
        raise InputError(f"The weights {path} can't be read ({reason}): name another file.") from None


def load_weights(path: Path, model: SSD, partial: bool = False) -> None:
    """Copy a file's weights into a model whose parameters are initialized.

    Args:
        path: the file.
        model: gets the weights, cast to its dtypes.
        partial: whether the file may lack some of the model's parameters. It may hold others in any case.
    """
    arrays = read_weights(path)
    parameters = {name.lstrip("/"): parameter for name, parameter in model.namedparams()}
    common = sorted(parameters.keys() & arrays.keys())
    missing = sorted(parameters.keys() - arrays.keys())
    if not common or (missing and not partial):
        raise InputError(
            f"{path} holds another model's weights ({missing[0]} is missing): name a file of this model."
        )
    for name in common:
        if parameters[name].shape != arrays[name].shape:
            raise InputError(
                f"{path} holds another model's weights ({name} has shape {arrays[name].shape}, not "
                f"{parameters[name].shape}): name a file of this model and number of classes."
            )
        parameters[name].array[...] = arrays[name]


def weights_of(model: SSD) -> dict[str, np.ndarray]:
    """What a file of a model's weights holds: parameters by path, and variances where they are not the usual
    ones, since offsets mean nothing without."""
    arrays = {path.lstrip("/"): cuda.to_cpu(parameter.array) for path, parameter in model.namedparams()}
    unusual = tuple(model.coder._variance) != VARIANCES
    return arrays | ({VARIANCES_KEY: np.array(model.coder._variance)} if unusual else {})


def save_weights(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays; a file of that name is replaced when the new one is complete."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        # Weights hardly shrink, and large models would take seconds.
        np.savez(file, **arrays)
        flush_to_disk(file)
    os.replace(partial, path)


class Contents(NamedTuple):
    """What a file of weights holds: a model's name, its number of classes without the background, a dtype,
    the variances of its default boxes."""

    model: str
    n_fg_class: int
    dtype: np.dtype
    variances: tuple[float, float]


def identify(path: Path) -> Contents:
    """Which model's weights a file holds. Raises InputError if it is none of ours."""
    arrays = read_weights(path)
    for mark, name in MODEL_MARKS.items():
        if mark in arrays and FIRST_HEAD in arrays:
            bias = arrays[FIRST_HEAD]
            centre, size = arrays.get(VARIANCES_KEY, VARIANCES)
            n_fg_class = bias.size // BOXES_IN_FIRST_CELLS - 1
            return Contents(name, n_fg_class, bias.dtype, (float(centre), float(size)))
    raise InputError(f"{path} holds weights of no model known here: small, ssd300 or ssd512.")
