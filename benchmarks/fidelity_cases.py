"""The networks whose gradients `fidelity.py` measures, with real data and the losses to train them with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ada_loss.chainer  # noqa: F401  isort: skip  (makes Chainer importable)

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.initializers import HeNormal

Batch = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
"""Inputs of a model, floating-point ones as float32 that float16 holds exactly, and targets of its loss."""


@dataclass(frozen=True)
class Case:
    """A network to measure.

    build: makes it in Chainer's dtype of the moment. batch: draws a batch. loss: of the model's outputs,
    float32 or wider, and the targets; a scalar. steps, rate: how it is trained, by Adam.
    """

    name: str
    build: Callable[[], chainer.Link]
    batch: Callable[[np.random.Generator], Batch]
    loss: Callable[..., chainer.Variable]
    steps: int = 60
    rate: float = 1e-3


class MLP(chainer.ChainList):
    """Linear layers with ReLU between them, and Chainer's default initial weights."""

    def __init__(self, width: int, depth: int, classes: int = 10) -> None:
        super().__init__(*(L.Linear(None, width) for _ in range(depth - 1)), L.Linear(None, classes))

    def forward(self, x: Any) -> chainer.Variable:
        *hidden, last = self
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class Uneven(chainer.Chain):
    """Every stage sees the input, and 2^-12 of the stage before: gradients of the first stage are about 2^-36
    times as large as those of the last, more than one scale can serve."""

    def __init__(self, width: int = 64, stages: int = 4, classes: int = 10) -> None:
        super().__init__()
        with self.init_scope():
            self.inputs = chainer.ChainList(*(L.Linear(None, width) for _ in range(stages)))
            self.steps = chainer.ChainList(*(L.Linear(width, width) for _ in range(stages - 1)))
            self.last = L.Linear(width, classes)

    def forward(self, x: Any) -> chainer.Variable:
        first, *others = self.inputs
        h = F.tanh(first(x))
        for see, step in zip(others, self.steps, strict=True):
            h = F.tanh(see(x) + 2.0**-12 * step(h))
        return self.last(h)


class VGG(chainer.Chain):
    """Pairs of 3x3 convolutions between poolings, no normalization."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 64), classes: int = 10) -> None:
        super().__init__()
        with self.init_scope():
            self.convolutions = chainer.ChainList(
                *(L.Convolution2D(None, width, 3, pad=1) for width in widths for _ in range(2))
            )
            self.hidden = L.Linear(None, 128)
            self.last = L.Linear(None, classes)

    def forward(self, x: Any) -> chainer.Variable:
        for index, convolution in enumerate(self.convolutions):
            x = F.relu(convolution(x))
            if index % 2:
                x = F.max_pooling_2d(x, 2)
        return self.last(F.relu(self.hidden(x)))


class ConvolutionBN(chainer.Chain):
    """A convolution and its batch normalization."""

    def __init__(self, width: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        with self.init_scope():
            self.convolution = L.Convolution2D(
                None, width, size, stride, size // 2, nobias=True, initialW=HeNormal()
            )
            self.normalization = L.BatchNormalization(width)

    def forward(self, x: Any) -> chainer.Variable:
        return self.normalization(self.convolution(x))


class Residual(chainer.Chain):
    """Two convolutions and a way around them, through another convolution where the width changes."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        with self.init_scope():
            self.first = ConvolutionBN(width, stride=stride)
            self.second = ConvolutionBN(width)
            if stride > 1:
                self.shortcut = ConvolutionBN(width, size=1, stride=stride)

    def forward(self, x: Any) -> chainer.Variable:
        h = self.second(F.relu(self.first(x)))
        return F.relu(h + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet20(chainer.Chain):
    """He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2, n = 3."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        strides = [
            (width, 2 if width > 16 and not index else 1) for width in (16, 32, 64) for index in range(3)
        ]
        with self.init_scope():
            self.first = ConvolutionBN(16)
            self.blocks = chainer.ChainList(*(Residual(width, stride) for width, stride in strides))
            self.last = L.Linear(None, classes)

    def forward(self, x: Any) -> chainer.Variable:
        x = F.relu(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(F.average(x, axis=(2, 3)))


class SegNet(chainer.Chain):
    """Poolings that remember where the largest value was, and unpoolings that put values back there."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 32), classes: int = 11) -> None:
        super().__init__()
        with self.init_scope():
            self.encoder = chainer.ChainList(*map(ConvolutionBN, widths))
            self.decoder = chainer.ChainList(*map(ConvolutionBN, (*widths[-2::-1], widths[0])))
            self.classifier = L.Convolution2D(None, classes, 1)

    def forward(self, x: Any) -> chainer.Variable:
        places = []
        for block in self.encoder:
            x = F.relu(block(x))
            shape = x.shape[2:]
            x, index = F.max_pooling_2d(x, 2, return_indices=True)
            places.append((index, shape))
        for block, (index, shape) in zip(self.decoder, reversed(places), strict=True):
            x = F.relu(block(F.upsampling_2d(x, index, 2, outsize=shape)))
        return self.classifier(x)


class RowLSTM(chainer.Chain):
    """Reads an image row by row with two LSTMs, and classifies it at the end."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        with self.init_scope():
            self.lower = L.LSTM(None, width)
            self.upper = L.LSTM(None, width)
            self.last = L.Linear(None, classes)

    def forward(self, rows: Any) -> chainer.Variable:
        self.lower.reset_state()
        self.upper.reset_state()
        for index in range(rows.shape[1]):
            h = self.upper(self.lower(rows[:, index]))
        return self.last(h)


class Attention(chainer.Chain):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        with self.init_scope():
            self.query = L.Linear(width, width)
            self.key = L.Linear(width, width)
            self.value = L.Linear(width, width)
            self.mix = L.Linear(width, width)

    def forward(self, x: Any) -> chainer.Variable:
        batch, length, width = x.shape
        query, key, value = (
            self._split(layer(x, n_batch_axes=2)) for layer in (self.query, self.key, self.value)
        )
        scores = F.matmul(query, key, transb=True) * (width // self.heads) ** -0.5
        later = np.broadcast_to(np.triu(np.ones((length, length), bool), 1), scores.shape)
        weights = F.softmax(F.where(later, np.full(scores.shape, -1e4, scores.dtype), scores), axis=3)
        mixed = F.transpose(F.matmul(weights, value), (0, 2, 1, 3))
        return self.mix(F.reshape(mixed, (batch, length, width)), n_batch_axes=2)

    def _split(self, x: chainer.Variable) -> chainer.Variable:
        batch, length, width = x.shape
        return F.transpose(F.reshape(x, (batch, length, self.heads, width // self.heads)), (0, 2, 1, 3))


class TransformerBlock(chainer.Chain):
    """Attention and a perceptron, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        with self.init_scope():
            self.attention = Attention(width, heads)
            self.attention_norm = L.LayerNormalization(width)
            self.expand = L.Linear(width, 4 * width)
            self.contract = L.Linear(4 * width, width)
            self.perceptron_norm = L.LayerNormalization(width)

    def forward(self, x: Any) -> chainer.Variable:
        x = x + self.attention(_normalized(self.attention_norm, x))
        h = self.expand(_normalized(self.perceptron_norm, x), n_batch_axes=2)
        return x + self.contract(F.relu(h), n_batch_axes=2)


class Transformer(chainer.Chain):
    """Predicts the next token of a sequence."""

    def __init__(
        self, tokens: int = 17, length: int = 64, width: int = 32, heads: int = 4, depth: int = 3
    ) -> None:
        super().__init__()
        with self.init_scope():
            self.tokens = L.EmbedID(tokens, width)
            self.positions = L.EmbedID(length, width)
            self.blocks = chainer.ChainList(*(TransformerBlock(width, heads) for _ in range(depth)))
            self.norm = L.LayerNormalization(width)
            self.last = L.Linear(width, tokens)

    def forward(self, tokens: np.ndarray) -> chainer.Variable:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.last(_normalized(self.norm, x), n_batch_axes=2)


def _normalized(norm: chainer.Link, x: chainer.Variable) -> chainer.Variable:
    return F.reshape(norm(F.reshape(x, (-1, x.shape[-1]))), x.shape)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: scans (N, 8, 8) of whole numbers from 0 to 16, labels int32 (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int32)


def _draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    scans, labels = _digits()
    chosen = rng.integers(len(scans), size=size)
    return scans[chosen] / 16, labels[chosen]


def _enlarged(scans: np.ndarray, factor: int) -> np.ndarray:
    return scans.repeat(factor, axis=1).repeat(factor, axis=2)


def _noisy(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With equal neighbours it would be left to rounding which of them a pooling takes for the largest."""
    return (images + rng.normal(scale=0.1, size=images.shape)).astype(np.float16).astype(np.float32)


def _vectors(rng: np.random.Generator) -> Batch:
    scans, labels = _draw(rng, 128)
    return (scans.reshape(len(scans), -1),), (labels,)


def _images(rng: np.random.Generator, factor: int = 4) -> Batch:
    scans, labels = _draw(rng, 16)
    return (_noisy(_enlarged(scans, factor)[:, None], rng),), (labels,)


def _rows(rng: np.random.Generator) -> Batch:
    scans, labels = _draw(rng, 64)
    return (_noisy(_enlarged(scans, 2), rng),), (labels,)


def _maps(rng: np.random.Generator) -> Batch:
    scans, labels = _draw(rng, 8)
    images = _enlarged(scans, 4)
    classes = np.where(images > 0.5, labels[:, None, None] + 1, 0).astype(np.int32)
    return (_noisy(images[:, None], rng),), (classes,)


def _sequences(rng: np.random.Generator) -> Batch:
    scans, _ = _draw(rng, 8)
    tokens = (scans * 16).astype(np.int32).reshape(len(scans), -1)
    return (tokens[:, :-1],), (tokens[:, 1:],)


def _classification(logits: chainer.Variable, labels: np.ndarray) -> chainer.Variable:
    return F.softmax_cross_entropy(logits, labels)


def _next_token(logits: chainer.Variable, tokens: np.ndarray) -> chainer.Variable:
    return F.softmax_cross_entropy(F.reshape(logits, (-1, logits.shape[-1])), tokens.ravel())


def _build_ssd() -> chainer.Link:
    from models import SmallSSD

    return SmallSSD(n_fg_class=10)


def _ssd_batch(rng: np.random.Generator) -> Batch:
    from data_digits import DigitsSettings, draw_image
    from digit_images import load_sources
    from models import SmallSSD

    sources, settings = load_sources(), DigitsSettings()
    coder = SmallSSD(n_fg_class=10).coder
    samples = []
    for _ in range(4):
        image, placed = draw_image(sources, np.arange(len(sources.scans)), settings, rng)
        boxes = np.array([digit.box for digit in placed], np.float32)
        labels = np.array([digit.label for digit in placed], np.int32)
        samples.append((image.transpose(2, 0, 1).astype(np.float32) - 120, *coder.encode(boxes, labels)))
    images, offsets, classes = map(np.stack, zip(*samples, strict=True))
    return (images,), (offsets, classes)


def _ssd_loss(locs: chainer.Variable, confs: chainer.Variable, *targets: np.ndarray) -> chainer.Variable:
    from loss import MultiboxLoss

    offsets, classes = targets
    loc_loss, conf_loss = MultiboxLoss()(locs, confs, offsets.astype(locs.dtype), classes)
    return loc_loss + conf_loss


def use_ssd_example() -> None:
    """Make the modules of the SSD example importable, in front of installed ones of the same names."""
    examples = Path(__file__).resolve().parents[1] / "examples"
    for folder in ("common", "ssd"):
        if str(examples / folder) not in sys.path:
            sys.path.insert(1, str(examples / folder))


CASES = {
    case.name: case
    for case in (
        Case("mlp20", lambda: MLP(width=100, depth=20), _vectors, _classification),
        Case("vgg", VGG, _images, _classification),
        Case("resnet20", ResNet20, partial(_images, factor=2), _classification),
        Case("ssd", _build_ssd, _ssd_batch, _ssd_loss),
        Case("segnet", SegNet, _maps, _classification),
        Case("lstm", RowLSTM, _rows, _classification),
        Case("transformer", Transformer, _sequences, _next_token),
        Case("uneven", Uneven, _vectors, _classification),
    )
}
