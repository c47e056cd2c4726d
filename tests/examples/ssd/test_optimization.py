from __future__ import annotations

import chainer
import chainer.links as L
import numpy as np
import pytest

from optimization import learning_rate, make_optimizer


def test_the_rate_falls_to_a_tenth_after_each_step():
    rates = [learning_rate(1e-3, (80_000, 100_000), 0, done) for done in (0, 79_999, 80_000, 99_999, 100_000)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def test_the_rate_rises_from_a_tenth_during_warm_up():
    rates = [learning_rate(1e-3, (80_000,), 1000, done) for done in (0, 500, 1000, 1001)]
    np.testing.assert_allclose(rates, [1e-4, 5.5e-4, 1e-3, 1e-3])


def one_update(loss_multiplier: float) -> L.Linear:
    link = L.Linear(3, 2, initialW=np.full((2, 3), 0.5, np.float32), initial_bias=np.ones(2, np.float32))
    optimizer = make_optimizer(link, loss_multiplier)
    optimizer.lr = 0.125
    link.W.grad = np.arange(6, dtype=np.float32).reshape(2, 3) * np.float32(loss_multiplier)
    link.b.grad = np.array([1, 2], np.float32) * np.float32(loss_multiplier)
    optimizer.update()
    return link


def test_weights_decay_and_biases_move_twice_as_far():
    link = one_update(1)
    gradient = np.arange(6).reshape(2, 3)
    np.testing.assert_allclose(link.W.array, 0.5 - 0.125 * (gradient + 5e-4 * 0.5), atol=1e-6)
    np.testing.assert_allclose(link.b.array, 1 - 0.125 * 2 * np.array([1, 2]), rtol=1e-6)


@pytest.mark.parametrize("loss_multiplier", [2.0**-18, 2.0**10])
def test_the_loss_multiplier_is_taken_back_exactly(loss_multiplier):
    expected, actual = one_update(1), one_update(loss_multiplier)
    for (name, parameter), (_, other) in zip(expected.namedparams(), actual.namedparams(), strict=True):
        np.testing.assert_array_equal(parameter.array, other.array, err_msg=name)


def test_momentum_is_nine_tenths():
    link = chainer.Chain()
    with link.init_scope():
        link.b = chainer.Parameter(np.zeros(1, np.float32))
    optimizer = make_optimizer(link, 1)
    optimizer.lr = 1
    positions = []
    for gradient in (1, 0, 0):
        link.b.grad = np.array([gradient], np.float32)
        optimizer.update()
        positions.append(float(link.b.array[0]))
    np.testing.assert_allclose(positions, [-2, -2 * 1.9, -2 * 2.71], rtol=1e-6)
