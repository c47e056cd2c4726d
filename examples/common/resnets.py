"""Residual networks of basic blocks: those for CIFAR, and ResNet-18.

He et al., "Deep residual learning for image recognition", CVPR 2016. The first block of a stage has a
convolution on its shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
from chainer import initializers
from chainercv.links import Conv2DBNActiv


class BasicBlock(chainer.Chain):
    """Two 3x3 convolutions and a shortcut, which has a 1x1 convolution if asked to."""

    def __init__(self, n_in: int, n_out: int, stride: int, convolve_shortcut: bool) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = _convolution(n_in, n_out, 3, stride)
            self.conv2 = _convolution(n_out, n_out, 3, activ=None)
            if convolve_shortcut:
                self.shortcut = _convolution(n_in, n_out, 1, stride, activ=None)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return F.relu(self.conv2(self.conv1(x)) + shortcut)


class BasicResNet(chainer.Chain):
    """A stem, stages of basic blocks that halve the sides and double the channels, and a classifier."""

    def __init__(self, stem: chainer.Link, n_in: int, blocks: Sequence[int], n_class: int) -> None:
        super().__init__()
        channels = [n_in * 2**stage for stage in range(len(blocks))]
        with self.init_scope():
            self.stem = stem
            self.blocks = chainer.Sequential()
            for stage, (n_blocks, n_out) in enumerate(zip(blocks, channels, strict=True)):
                for i in range(n_blocks):
                    stride = 2 if i == 0 and stage > 0 else 1
                    self.blocks.append(BasicBlock(n_in, n_out, stride, convolve_shortcut=i == 0))
                    n_in = n_out
            self.fc = L.Linear(n_in, n_class, initialW=initializers.Normal(0.01))

    def forward(self, x: Any) -> chainer.Variable:
        return self.fc(F.average(self.blocks(self.stem(x)), axis=(2, 3)))


def cifar_resnet(n_layer: int, n_class: int) -> BasicResNet:
    """ResNet-20, -32, -44, -56, -110: three stages of (n_layer - 2) / 6 blocks on 32x32 pixels."""
    return BasicResNet(_convolution(3, 16, 3), 16, [(n_layer - 2) // 6] * 3, n_class)


def resnet18(n_class: int) -> BasicResNet:
    stem = chainer.Sequential(
        _convolution(3, 64, 7, 2), lambda x: F.max_pooling_2d(x, 3, 2, 1, cover_all=False)
    )
    return BasicResNet(stem, 64, [2, 2, 2, 2], n_class)


def _convolution(n_in: int, n_out: int, size: int, stride: int = 1, **options: Any) -> Conv2DBNActiv:
    weights = initializers.HeNormal(scale=1.0, fan_option="fan_out")
    return Conv2DBNActiv(n_in, n_out, size, stride, size // 2, nobias=True, initialW=weights, **options)
