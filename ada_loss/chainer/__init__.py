"""Adaptive loss scaling for Chainer: give a link to `AdaLossScaled`, `prepare` the optimizer, and train."""

from ada_loss.chainer import compat as compat  # isort: skip  (has to come before Chainer)

from ada_loss.chainer import backward, extensions, functions, grad, kernels, links
from ada_loss.chainer.links import AdaLossBranch, AdaLossConvolution2D, AdaLossDeconvolution2D, AdaLossLinear
from ada_loss.chainer.optimizer import Diverged, prepare
from ada_loss.chainer.recording import record
from ada_loss.chainer.scaled import AdaLossScaled
from ada_loss.chainer.user_functions import linear_backward

__all__ = [
    "AdaLossBranch",
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

# NumPy has no float16 arithmetic worth the name; float32 and float64 stay Chainer's own.
kernels.use("numpy")

# Gradients in a scope carry exponents; every other graph is left to Chainer's own engine.
backward.install()
grad.install()
