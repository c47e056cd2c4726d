"""Functions for models that are written with scaling in mind.

Inside `AdaLossScaled` Chainer's own functions are decision points as well. Those here take a name, under
which their decisions are recorded in place of the link's path, and settings of their own; outside they are
Chainer's.
"""

from ada_loss.chainer.functions.branch import branch
from ada_loss.chainer.functions.named import (
    batch_matmul,
    cast,
    convolution_1d,
    convolution_2d,
    convolution_3d,
    convolution_nd,
    deconvolution_1d,
    deconvolution_2d,
    deconvolution_3d,
    deconvolution_nd,
    depthwise_convolution_2d,
    dilated_convolution_2d,
    einsum,
    linear,
    local_convolution_2d,
    matmul,
    named,
    tensordot,
)

__all__ = [
    "batch_matmul",
    "branch",
    "cast",
    "convolution_1d",
    "convolution_2d",
    "convolution_3d",
    "convolution_nd",
    "deconvolution_1d",
    "deconvolution_2d",
    "deconvolution_3d",
    "deconvolution_nd",
    "depthwise_convolution_2d",
    "dilated_convolution_2d",
    "einsum",
    "linear",
    "local_convolution_2d",
    "matmul",
    "named",
    "tensordot",
]
