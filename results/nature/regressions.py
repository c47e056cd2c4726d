"""Regressions whose losses are squared errors in the quantities' own units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import initializers
from chainer.optimizers import Adam
from problems import Training, as_input, batch_indices, in_float32
from sklearn.datasets import load_breast_cancer

WIDTH = 64


class Perceptron(chainer.Chain):
    """Two hidden layers and a linear head for each quantity."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(n_in, WIDTH, initialW=initializers.HeNormal())
            self.second = L.Linear(WIDTH, WIDTH, initialW=initializers.HeNormal())
            self.heads = chainer.ChainList(*[L.Linear(WIDTH, 1) for _ in range(n_out)])

    def forward(self, x: Any) -> tuple[chainer.Variable, ...]:
        h = F.relu(self.second(F.relu(self.first(x))))
        return tuple(head(h) for head in self.heads)


class Regression:
    """Predicts quantities from standardized inputs; the loss is the sum of their mean squared errors.

    A head gives how far a quantity is from its mean, in standard deviations, so that no output is large; the
    loss is in the units of the data all the same, as it is in a script that does not think of them.

    Args:
        inputs: standardized, (N, features).
        targets: in their own units, (N, quantities).
        n_train: the first so many are trained on.
        batchsize, seed: of the batches.
    """

    def __init__(
        self, inputs: np.ndarray, targets: np.ndarray, n_train: int, batchsize: int, seed: int
    ) -> None:
        self._inputs, self._targets = inputs.astype(np.float32), targets.astype(np.float32)
        self._n_train, self._batchsize, self._seed = n_train, batchsize, seed
        self._mean, self._std = self._targets[:n_train].mean(axis=0), self._targets[:n_train].std(axis=0)
        self.models = (Perceptron(inputs.shape[1], targets.shape[1]),)

    def steps(self, iteration: int) -> Iterator[tuple[int, chainer.Variable]]:
        picked = batch_indices(self._n_train, self._batchsize, self._seed, iteration)
        predicted = self._predict(self._inputs[picked])
        truth = self._targets[picked]
        yield 0, sum(F.mean_squared_error(y, truth[:, i : i + 1]) for i, y in enumerate(predicted))

    def error(self) -> float:
        """Root mean squared error over standard deviation, the mean over the quantities."""
        predicted = self._predict(self._inputs[self._n_train :])
        truth = self._targets[self._n_train :]
        squares = [((y.array[:, 0] - truth[:, i]) ** 2).mean() for i, y in enumerate(predicted)]
        return float(np.mean(np.sqrt(squares) / truth.std(axis=0)))

    def _predict(self, inputs: np.ndarray) -> list[chainer.Variable]:
        outputs = self.models[0](as_input(inputs))
        scales = zip(outputs, self._mean, self._std, strict=True)
        return [mean + std * in_float32(output) for output, mean, std in scales]


def beams(seed: int, n_beams: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and states of simply supported beams under a uniform load, at one place each, in SI units.

    A beam of 2 to 6 m and of a stiffness of 2e6 to 2e7 N m^2 carries 1 to 10 kN/m. Its state: deflection (m),
    rotation (rad), bending moment (N m) and shear force (N), by Euler and Bernoulli.
    """
    rng = np.random.default_rng([seed, 3])
    place = rng.random(n_beams)
    length = rng.uniform(2, 6, n_beams)
    load = rng.uniform(1e3, 1e4, n_beams)
    stiffness = rng.uniform(2e6, 2e7, n_beams)
    x = place * length
    deflection = load * x * (length**3 - 2 * length * x**2 + x**3) / (24 * stiffness)
    rotation = load * (length**3 - 6 * length * x**2 + 4 * x**3) / (24 * stiffness)
    moment = load * x * (length - x) / 2
    shear = load * (length / 2 - x)
    inputs = (2 * place - 1, (length - 4) / 2, (load - 5.5e3) / 4.5e3, np.log(stiffness / 6.3e6))
    return np.stack(inputs, axis=1), np.stack((deflection, rotation, moment, shear), axis=1)


def beam(seed: int) -> Regression:
    inputs, states = beams(seed, 2500)
    return Regression(inputs, states, n_train=2000, batchsize=64, seed=seed)


def deflection(seed: int) -> Regression:
    inputs, states = beams(seed, 2500)
    return Regression(inputs, states[:, :1], n_train=2000, batchsize=64, seed=seed)


def nuclei(seed: int) -> Regression:
    """Of cell nuclei, from the means of ten measurements their spread and their largest values."""
    measured = load_breast_cancer().data
    measured = measured[np.random.default_rng([seed, 1]).permutation(len(measured))]
    means, others = measured[:, :10], measured[:, 10:]
    inputs = (means - means.mean(axis=0)) / means.std(axis=0)
    return Regression(inputs, others, n_train=455, batchsize=32, seed=seed)


ERROR = "RMSE over standard deviation, mean over quantities"
BEAM = Training(
    "beam",
    "Deflection, rotation, moment and shear force of beams, in SI units",
    ERROR,
    beam,
    lambda: (Adam(3e-3),),
    1000,
    tuple(range(-24, 9, 4)),
)
DEFLECTION = Training(
    "deflection",
    "Deflection of beams, in metres",
    ERROR,
    deflection,
    lambda: (Adam(3e-3),),
    1000,
)
NUCLEI = Training(
    "nuclei",
    "Twenty measurements of cell nuclei, in their units",
    ERROR,
    nuclei,
    lambda: (Adam(2e-3),),
    500,
    (-8, -4, -3, -2, 0),
)
