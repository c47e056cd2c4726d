"""Networks for digits and photographs: means over pixels, no normalization, an adversarial pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import initializers
from chainer.optimizers import Adam
from PIL import Image
from problems import Training, as_input, batch_indices, in_float32
from sklearn.datasets import load_digits, load_sample_images

SIDE = 64


class Deep(chainer.Chain):
    """Rectified linear layers as Chainer initializes them, without normalization: they shrink what passes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        with self.init_scope():
            self.layers = chainer.ChainList(*[L.Linear(64, 64) for _ in range(depth)], L.Linear(64, 10))

    def forward(self, x: Any) -> chainer.Variable:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class DeepDigits:
    """Classifies digits with 16 hidden layers."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        order = np.random.default_rng([seed, 1]).permutation(len(digits.target))
        self._images = (digits.data[order] / 8 - 1).astype(np.float32)
        self._labels = digits.target[order].astype(np.int32)
        self._seed = seed
        self.models = (Deep(16),)

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        picked = batch_indices(1400, 64, self._seed, iteration)
        scores = in_float32(self.models[0](as_input(self._images[picked])))
        yield 0, F.softmax_cross_entropy(scores, self._labels[picked])

    def error(self) -> float:
        scores = self.models[0](as_input(self._images[1400:]))
        return float((scores.array.argmax(axis=1) != self._labels[1400:]).mean())


class Convolutions(chainer.Chain):
    """Four convolutions that keep the size of an image."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        channels = (1, 16, 16, 16, n_out)
        pairs = zip(channels[:-1], channels[1:], strict=True)
        he = initializers.HeNormal()
        with self.init_scope():
            self.layers = chainer.ChainList(*[L.Convolution2D(i, o, 3, pad=1, initialW=he) for i, o in pairs])

    def forward(self, x: Any) -> chainer.Variable:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class Photographs:
    """Crops of the two photographs, grey, 0 to 1: the left two thirds train, the right third tests."""

    def __init__(self) -> None:
        self._images = [image.mean(axis=2) / 255 for image in load_sample_images().images]

    def crops(self, rng: np.random.Generator, n_crops: int, test: bool) -> np.ndarray:
        first, last = (427, 640) if test else (0, 427)
        crops = np.empty((n_crops, 1, SIDE, SIDE), np.float32)
        for crop in crops:
            image = self._images[rng.integers(len(self._images))]
            top, left = rng.integers(image.shape[0] - SIDE), rng.integers(first, last - SIDE)
            crop[0] = image[top : top + SIDE, left : left + SIDE]
        return crops


class Denoising:
    """Finds noise of 0.1 in photographs; squared errors, averaged over 65,536 pixels."""

    noise = 0.1

    def __init__(self, seed: int) -> None:
        self._photographs, self._seed = Photographs(), seed
        rng = np.random.default_rng([seed, 9])
        self._test = self._photographs.crops(rng, 16, test=True), self._noise(rng, 16)
        self.models = (Convolutions(1),)

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        rng = np.random.default_rng([self._seed, 1, iteration])
        crops, noise = self._photographs.crops(rng, 16, test=False), self._noise(rng, 16)
        found = in_float32(self.models[0](as_input(crops + noise)))
        yield 0, F.mean_squared_error(found, noise)

    def error(self) -> float:
        crops, noise = self._test
        found = in_float32(self.models[0](as_input(crops + noise))).array
        return float(np.sqrt(((found - noise) ** 2).mean()) / self.noise)

    def _noise(self, rng: np.random.Generator, n_crops: int) -> np.ndarray:
        return rng.normal(0, self.noise, (n_crops, 1, SIDE, SIDE)).astype(np.float32)


class Segmentation:
    """Finds the ink of digits on photographs; cross entropy, averaged over 32,768 pixels."""

    batchsize = 8

    def __init__(self, seed: int) -> None:
        photographs, scans = Photographs(), load_digits().images / 16
        rng = np.random.default_rng([seed, 1])
        self._train = self._draw(photographs, scans[:1400], rng, 160, test=False)
        self._test = self._draw(photographs, scans[1400:], rng, 16, test=True)
        self._seed = seed
        self.models = (Convolutions(2),)

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        picked = batch_indices(160, self.batchsize, self._seed, iteration)
        images, labels = (part[picked] for part in self._train)
        yield 0, F.softmax_cross_entropy(in_float32(self.models[0](as_input(images))), labels)

    def error(self) -> float:
        """One minus the mean intersection over union of ink and background."""
        images, labels = self._test
        found = self.models[0](as_input(images)).array.argmax(axis=1)
        overlaps = [
            ((found == c) & (labels == c)).sum() / ((found == c) | (labels == c)).sum() for c in (0, 1)
        ]
        return 1 - float(np.mean(overlaps))

    @staticmethod
    def _draw(
        photographs: Photographs, scans: np.ndarray, rng: np.random.Generator, n_images: int, test: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        images = photographs.crops(rng, n_images, test)
        labels = np.zeros((n_images, SIDE, SIDE), np.int32)
        for image, label in zip(images[:, 0], labels, strict=True):
            for scan in scans[rng.integers(len(scans), size=rng.integers(1, 4))]:
                size = int(rng.integers(16, 33))
                y, x = rng.integers(SIDE - size, size=2)
                here = (slice(y, y + size), slice(x, x + size))
                enlarged = Image.fromarray(scan.astype(np.float32)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
                ink = np.clip(np.asarray(enlarged), 0, 1)
                image[here] += ink * ((0.1 if image[here].mean() > 0.5 else 0.9) - image[here])
                label[here] |= ink > 0.5
        return images, labels


class Multilayer(chainer.Chain):
    """Leaky linear layers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        he, pairs = initializers.HeNormal(), zip(sizes[:-1], sizes[1:], strict=True)
        with self.init_scope():
            self.layers = chainer.ChainList(*[L.Linear(n_in, n_out, initialW=he) for n_in, n_out in pairs])

    def forward(self, x: Any) -> chainer.Variable:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.leaky_relu(layer(x))
        return last(x)


class AdversarialPair:
    """A generator of digits and a critic, by the saturating loss of the first paper on them."""

    batchsize, noise = 64, 16

    def __init__(self, seed: int) -> None:
        digits = (load_digits().data / 8 - 1).astype(np.float32)
        self._digits = digits[np.random.default_rng([seed, 1]).permutation(len(digits))]
        self._seed = seed
        self.models = (Multilayer(64, 256, 256, 1), Multilayer(self.noise, 128, 128, 64))

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        critic, _ = self.models
        rng = np.random.default_rng([self._seed, 2, iteration])
        real = as_input(self._digits[rng.integers(1400, size=self.batchsize)])
        drawn = self._generate(rng, self.batchsize).array
        losses = F.softplus(-in_float32(critic(real))), F.softplus(in_float32(critic(drawn)))
        yield 0, F.mean(losses[0]) + F.mean(losses[1])
        yield 1, -F.mean(F.softplus(in_float32(critic(self._generate(rng, self.batchsize)))))

    def error(self) -> float:
        """The energy distance between generated digits and real ones."""
        generated = self._generate(np.random.default_rng([self._seed, 3]), 300).array.astype(np.float32)
        real = self._digits[1400:]
        return 2 * _distance(generated, real) - _distance(generated, generated) - _distance(real, real)

    def _generate(self, rng: np.random.Generator, n_digits: int) -> chainer.Variable:
        noise = as_input(rng.normal(size=(n_digits, self.noise)))
        return F.cast(F.tanh(self.models[1](noise)), chainer.get_dtype())


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1)).mean())


DEEP = Training(
    "deep",
    "16 rectified layers without normalization",
    "share of digits misclassified",
    DeepDigits,
    lambda: (Adam(1e-3),),
    250,
)
DENOISING = Training(
    "denoising",
    "Denoising photographs, averaged over pixels",
    "RMSE over the noise",
    Denoising,
    lambda: (Adam(2e-3),),
    50,
)
SEGMENTATION = Training(
    "segmentation",
    "Segmentation of digits' ink, averaged over pixels",
    "1 - mean IoU",
    Segmentation,
    lambda: (Adam(3e-3),),
    220,
)
ADVERSARIAL = Training(
    "adversarial",
    "An adversarial pair",
    "energy distance",
    AdversarialPair,
    lambda: (Adam(2e-3, beta1=0.5), Adam(2e-4, beta1=0.5)),
    250,
)
