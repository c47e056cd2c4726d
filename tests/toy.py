"""A small model, data for it, and training steps, for tests of everything that follows the backward."""

from __future__ import annotations

from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.chainer.parameters import ScaledParameter, adopt
from helpers import dtype

SIZE, CLASSES = 6, 3


class Net(chainer.Chain):
    """Fan-out, a layer used twice, float32 parameters between float16 ones.

    size: of the input, None to leave it to the first batch. norm: makes a normalization of so many channels.
    """

    def __init__(self, size: int | None = SIZE, norm: Any = L.BatchNormalization) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(size, 8)
            self.norm = norm(8)
            self.shared = L.Linear(8, 8)
            self.last = L.Linear(None if size is None else 8, CLASSES)

    def forward(self, x: Any) -> chainer.Variable:
        h = F.relu(self.norm(self.first(x)))
        return self.last(h + F.tanh(self.shared(F.relu(self.shared(h)))))


def twice() -> chainer.Link:
    """A layer that is registered and used twice."""
    layer = L.Linear(SIZE, SIZE, initialW=np.full((SIZE, SIZE), 0.1))
    return chainer.Sequential(layer, F.relu, layer)


class Training(chainer.Chain):
    """A loss around a model, with a layer of its own outside the model. weight: what the loss counts."""

    weight = 1.0

    def __init__(self, model: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            self.head = L.Linear(CLASSES, CLASSES, initialW=np.eye(CLASSES))
            self.model = model

    def forward(self, x: Any, t: Any) -> chainer.Variable:
        y = self.model(x)
        y = self.head(F.cast(y, self.head.W.dtype))
        return self.weight * F.mean_squared_error(y, t.astype(y.dtype))


def batch(rng: np.random.Generator, count: int = 5, magnitude: float = 1.0) -> tuple[Any, Any]:
    """Inputs in Chainer's default dtype, and float32 targets."""
    x = rng.standard_normal((count, SIZE)).astype(chainer.get_dtype())
    return x, (magnitude * rng.standard_normal((count, CLASSES))).astype(np.float32)


def training(
    precision: str = "mixed16",
    method: str = "approx_range",
    norm: Any = L.BatchNormalization,
    seed: int = 0,
    **settings: Any,
) -> Training:
    """A wrapped model with a loss, with the same initial weights for the same precision and seed."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        with dtype(precision):
            return Training(AdaLossScaled(Net(norm=norm), method, **settings))
    finally:
        np.random.set_state(state)


def prepared(target: chainer.Link, optimizer: Any = None, *hooks: Any) -> Any:
    """A prepared optimizer, MomentumSGD unless another one is given."""
    optimizer = optimizer or chainer.optimizers.MomentumSGD(0.05)
    optimizer.setup(target)
    for hook in hooks:
        optimizer.add_hook(hook)
    return prepare(optimizer)


def values(target: chainer.Link) -> dict[str, Any]:
    """Copies of all parameters' arrays, by path."""
    return {path: None if p.array is None else p.array.copy() for path, p in target.namedparams()}


def masters(target: chainer.Link) -> dict[str, Any]:
    """Copies of the float32 masters, by path; of the parameter itself where it is float32 or has none yet."""
    return {path: wide(p) for path, p in target.namedparams() if p.array is not None}


def wide(parameter: Any) -> Any:
    """What a parameter is in float32."""
    master = getattr(parameter, "master", None)
    return np.array(parameter.array if master is None else master, np.float32)


class Twin(chainer.Chain):
    """Plain float32 parameters with the values of a target's masters: what these ought to become."""

    def __init__(self, target: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            for index, parameter in enumerate(target.params()):
                setattr(self, f"p{index:02}", chainer.Parameter(wide(parameter)))

    def take_gradients(self, target: chainer.Link) -> None:
        """Make the target's true gradients this link's."""
        for mine, other in zip(self.params(), target.params(), strict=True):
            mine.grad = None if other.grad is None else other.grad.copy()

    def assert_is(self, target: chainer.Link) -> None:
        """The target's masters are this link's parameters, bit for bit, and its float16 is their rounding."""
        for mine, (path, other) in zip(self.params(), target.namedparams(), strict=True):
            np.testing.assert_array_equal(wide(other), mine.array, err_msg=path)
            np.testing.assert_array_equal(other.array, mine.array.astype(other.dtype), err_msg=path)


SCALES = [2.0**-4, 1.0, 2.0**10]
"""Loss scales, which make no difference to an update."""


def backward(target: chainer.Link, data: Any, loss_scale: float | None = None) -> None:
    """The gradients of a batch, and of nothing before."""
    target.cleargrads()
    target(*data).backward(loss_scale=loss_scale)


def compare(target: chainer.Link, optimizer: Any, reference: Any, data: Any, *adds: Any) -> None:
    """Run a step for each loss scale, and the same steps of another optimizer on plain float32 parameters.

    adds: functions that add hooks, called with each optimizer and its target.
    """
    twin = Twin(target)
    reference.setup(twin)
    for add in adds:
        add(optimizer, target)
        add(reference, twin)
    for loss_scale in SCALES:
        backward(target, data, loss_scale)
        twin.take_gradients(target)
        optimizer.update()
        reference.update()
        twin.assert_is(target)
    assert optimizer.t == reference.t == len(SCALES)


def a_parameter(dtype: str = "float16", shape: tuple[int, ...] = (3,)) -> ScaledParameter:
    """A parameter of ones, without a gradient."""
    made = adopt(chainer.Parameter(np.ones(shape, dtype)))
    made.cleargrad()
    return made
