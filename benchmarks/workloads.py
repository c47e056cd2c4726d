"""What the speed benchmarks train: networks, their losses and random batches, under every way of scaling."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fidelity_cases import MLP, ResNet20, use_ssd_example

import chainer  # isort: skip  (made importable by the cases)
import chainer.functions as F
import numpy as np
from chainer.initializers import HeNormal
from machine import Machine
from side_by_side import run

import ada_loss.chainer as ada

use_ssd_example()
from loss import MultiboxLoss  # noqa: E402
from models import MODELS, build_model  # noqa: E402
from optimization import make_optimizer  # noqa: E402
from training import TrainChain  # noqa: E402

CLASSES = 10
POSITIVES = 0.02
"""Share of the default boxes of a random image that hold an object."""

LEARNING_RATE = 1e-4
"""Small enough that random data does not drive the weights anywhere."""

Batch = tuple[np.ndarray, ...]
"""Inputs and then targets, images as float32."""

Draw = Callable[[np.random.Generator, int], Batch]
"""Draws a batch of so many samples."""

DYNAMIC = {"loss_scale_method": "fixed", "init_scale": 2.0**15, "dynamic_interval": 1000}
"""Starts where Chainer's dynamic scaling ends up, so that no step that is measured makes it grow."""

PLAIN = "plain float16"
FIXED = "fixed"

METHODS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    FIXED: {"loss_scale_method": "fixed"},
    "dynamic": DYNAMIC,
    "approx_range": {"loss_scale_method": "approx_range"},
    "approx_range, every 10": {"loss_scale_method": "approx_range", "update_per_n_iteration": 10},
    "approx_range, delayed": {"loss_scale_method": "approx_range", "timing": "delayed"},
    "auto": {"loss_scale_method": "auto"},
    "auto, every 10": {"loss_scale_method": "auto", "update_per_n_iteration": 10},
    "auto, delayed": {"loss_scale_method": "auto", "timing": "delayed"},
}
"""Settings of `AdaLossScaled` by the name in the tables; None for Chainer's own mixed precision."""

CYCLE = 10
"""Iterations after which every method has done everything that it does."""


@dataclass(frozen=True)
class Workload:
    """A network to train.

    name: in the tables. model: makes the network with the weights of a seed, in Chainer's dtype of the
    moment. objective: makes a link that computes the loss from a batch, given the network, scaled or not.
    batch: draws one of so many samples.
    """

    name: str
    model: Callable[[int], chainer.Link]
    objective: Callable[[chainer.Link], chainer.Link]
    batch: Draw
    batchsize: int

    def batches(self, rng: np.random.Generator, machine: Machine) -> Iterator[Batch]:
        """Fresh random batches on the machine's device, for ever."""
        while True:
            yield machine.send(self.batch(rng, self.batchsize))


class Classifier(chainer.Chain):
    """Softmax cross entropy of a network's float32 logits."""

    def __init__(self, model: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            self.model = model
        # With mixed16 the normalizations have float32 parameters.
        self._dtype = min((parameter.dtype for parameter in model.params()), key=lambda dtype: dtype.itemsize)

    def forward(self, x: np.ndarray, labels: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.model(x.astype(self._dtype, copy=False)), labels)


class Unscaled(chainer.Chain):
    """A network without loss scaling whose results leave it as float32, as those of `AdaLossScaled` do."""

    def __init__(self, model: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            self.model = model

    def forward(self, x: np.ndarray) -> Any:
        results = self.model(x)
        if isinstance(results, tuple):
            return tuple(F.cast(result, np.float32) for result in results)
        return F.cast(results, np.float32)


class Training:
    """A network's training iteration: a program for `side_by_side`, with the phases forward, backward and
    update.

    settings: of `AdaLossScaled`; None to train with Chainer's own float32 updates. dtype: of the network,
    mixed16 (float16 but for normalizations) unless told otherwise. multi_node: makes an optimizer average
    over processes.
    """

    def __init__(
        self,
        workload: Workload,
        settings: dict[str, Any] | None,
        machine: Machine,
        seed: int,
        *,
        dtype: Any = chainer.mixed16,
        multi_node: Callable[[Any], Any] = lambda optimizer: optimizer,
    ) -> None:
        with chainer.using_config("dtype", dtype):
            model = machine.place(workload.model(seed))
        scaled = Unscaled(model) if settings is None else ada.AdaLossScaled(model, **settings)
        self.chain = workload.objective(scaled)
        optimizer = make_optimizer(self.chain, 1)
        optimizer.lr = LEARNING_RATE
        if settings is None and dtype != np.float32:
            optimizer.use_fp32_update()
        self.optimizer = multi_node(optimizer)
        if settings is not None:
            ada.prepare(self.optimizer)

    def __call__(self, batch: Batch) -> Iterator[str]:
        loss = self.chain(*batch)
        yield "forward"
        self.chain.cleargrads()
        loss.backward()
        del loss
        yield "backward"
        self.optimizer.update()
        yield "update"

    @property
    def skipped(self) -> int:
        """Steps that were not taken because of an overflow."""
        overflow = getattr(self.optimizer, "overflow", None)
        return overflow.skipped if overflow else 0


class Settling(Protocol):
    """A training of either framework; `skipped` steps were not taken because of an overflow."""

    skipped: int

    def __call__(self, batch: Batch) -> Iterator[str]: ...


def settle(trainings: Iterable[Settling], batches: Iterator[Batch]) -> None:
    """Train until no entry scale changes any more: until each has taken two steps in a row."""
    for training in trainings:
        taken = 0
        while taken < 2:
            skipped = training.skipped
            run(training, next(batches))
            taken = taken + 1 if training.skipped == skipped else 0


def mlp(depth: int, width: int, batchsize: int) -> Workload:
    """A perceptron whose activations and gradients keep their size, so that none of 100 layers is left with
    zeros."""

    def model(seed: int) -> chainer.Link:
        made = MLP(width, depth, CLASSES)
        for layer in made:
            layer.W.initializer = HeNormal()
        return _initialized(made, seed, (width,))

    return Workload(f"MLP of {depth} layers of {width}", model, Classifier, _samples((width,)), batchsize)


def resnet20(batchsize: int) -> Workload:
    """ResNet-20 on images of CIFAR's size."""
    shape = 3, 32, 32
    return Workload(
        "ResNet-20",
        lambda seed: _initialized(ResNet20(CLASSES), seed, shape),
        Classifier,
        _samples(shape),
        batchsize,
    )


def detector(kind: str, name: str, batchsize: int) -> Workload:
    """An SSD of the example with its loss."""
    return Workload(
        name,
        lambda seed: build_model(kind, CLASSES, "lecun-uniform", seed),
        lambda model: TrainChain(model, MultiboxLoss(), 1),
        _detections(kind),
        batchsize,
    )


def _initialized(model: chainer.Link, seed: int, shape: tuple[int, ...]) -> chainer.Link:
    np.random.seed(seed)
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        model(np.zeros((1, *shape), chainer.get_dtype(map_mixed16=np.float16)))
    return model


def _samples(shape: tuple[int, ...]) -> Draw:
    def draw(rng: np.random.Generator, size: int) -> Batch:
        labels = rng.integers(CLASSES, size=size).astype(np.int32)
        return rng.standard_normal((size, *shape), np.float32), labels

    return draw


def _detections(kind: str) -> Draw:
    """Images (B, 3, insize, insize) as if preprocessed, offsets (B, K, 4) and labels (B, K)."""
    empty = MODELS[kind].build(CLASSES)
    insize, n_boxes = empty.insize, len(empty.coder._default_bbox)

    def draw(rng: np.random.Generator, size: int) -> Batch:
        images = rng.uniform(-128, 128, (size, 3, insize, insize)).astype(np.float32)
        offsets = rng.standard_normal((size, n_boxes, 4), np.float32)
        labels = rng.integers(1, CLASSES + 1, (size, n_boxes)) * (rng.random((size, n_boxes)) < POSITIVES)
        return images, offsets, labels.astype(np.int32)

    return draw


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "small": lambda: detector("small", "small SSD", 16),
    "resnet20": lambda: resnet20(32),
    "mlp100": lambda: mlp(100, 32, 32),
    "ssd300": lambda: detector("ssd300", "SSD300", 1),
}
"""By the name on the command line."""


def workload_of(name: str, options: argparse.Namespace) -> Workload:
    """The workload of this name, for a batch of two samples in a quick run."""
    workload = WORKLOADS[name]()
    return replace(workload, batchsize=2) if options.quick else workload
