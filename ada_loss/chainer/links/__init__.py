"""Scaled variants of Chainer's layers, under their names with `AdaLoss` in front.

A variant has the constructor, parameters and behaviour of the layer that it is named after; inside
`AdaLossScaled` it is a decision point. `AdaLossScaled` turns layers into variants by itself; use these to
write a model with them, or to give a layer settings of its own:
`AdaLossLinear(10, 3).with_config(AdaLossConfig(loss_scale_method="fixed"))`.
"""

from __future__ import annotations

import chainer.links as L

from ada_loss.chainer.links.branch import AdaLossBranch
from ada_loss.chainer.links.variant import ScaledLayer, as_variant


class AdaLossLinear(ScaledLayer, L.Linear):
    """`chainer.links.Linear` as a decision point."""


class AdaLossConvolution1D(ScaledLayer, L.Convolution1D):
    """`chainer.links.Convolution1D` as a decision point."""


class AdaLossConvolution2D(ScaledLayer, L.Convolution2D):
    """`chainer.links.Convolution2D` as a decision point."""


class AdaLossConvolution3D(ScaledLayer, L.Convolution3D):
    """`chainer.links.Convolution3D` as a decision point."""


class AdaLossConvolutionND(ScaledLayer, L.ConvolutionND):
    """`chainer.links.ConvolutionND` as a decision point."""


class AdaLossDilatedConvolution2D(ScaledLayer, L.DilatedConvolution2D):
    """`chainer.links.DilatedConvolution2D` as a decision point."""


class AdaLossDepthwiseConvolution2D(ScaledLayer, L.DepthwiseConvolution2D):
    """`chainer.links.DepthwiseConvolution2D` as a decision point."""


class AdaLossLocalConvolution2D(ScaledLayer, L.LocalConvolution2D):
    """`chainer.links.LocalConvolution2D` as a decision point."""


class AdaLossSimplifiedDropconnect(ScaledLayer, L.SimplifiedDropconnect):
    """`chainer.links.SimplifiedDropconnect` as a decision point."""


class AdaLossDeconvolution1D(ScaledLayer, L.Deconvolution1D):
    """`chainer.links.Deconvolution1D` as a decision point."""


class AdaLossDeconvolution2D(ScaledLayer, L.Deconvolution2D):
    """`chainer.links.Deconvolution2D` as a decision point."""


class AdaLossDeconvolution3D(ScaledLayer, L.Deconvolution3D):
    """`chainer.links.Deconvolution3D` as a decision point."""


class AdaLossDeconvolutionND(ScaledLayer, L.DeconvolutionND):
    """`chainer.links.DeconvolutionND` as a decision point."""


LAYERS: tuple[type, ...] = tuple(variant.__mro__[2] for variant in ScaledLayer.__subclasses__())
"""The layer classes that have variants; subclasses of theirs get one on first use."""

__all__ = ["LAYERS", "AdaLossBranch", "ScaledLayer", "as_variant"]
__all__ += [variant.__name__ for variant in ScaledLayer.__subclasses__()]
