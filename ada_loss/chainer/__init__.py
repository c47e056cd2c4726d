"""Adaptive loss scaling for Chainer: give a link to `AdaLossScaled`, `prepare` the optimizer, and train."""

from ada_loss.chainer import requirement as requirement  # isort: skip  (says what is missing)
from ada_loss.chainer import compat as compat  # isort: skip  (has to come before Chainer)

from ada_loss.chainer import extensions, functions, kernels, links
from ada_loss.chainer.links import AdaLossBranch, AdaLossConvolution2D, AdaLossDeconvolution2D, AdaLossLinear
from ada_loss.chainer.optimizer import Diverged
from ada_loss.chainer.preparing import prepare
from ada_loss.chainer.recording import record
from ada_loss.chainer.scaled import AdaLossScaled
from ada_loss.chainer.user_functions import linear_backward
from ada_loss.core.config import AdaLossConfig

__all__ = [
    "AdaLossBranch",
    "AdaLossConfig",
    "AdaLossConvolution2D",
    "AdaLossDeconvolution2D",
    "AdaLossLinear",
    "AdaLossScaled",
    "Diverged",
    "extensions",
    "functions",
    "kernels",
    "linear_backward",
    "links",
    "prepare",
    "record",
]
