"""The ways for GPUs, taken with NumPy arrays in place of a GPU's."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import pretended_gpu
from ada_loss.chainer import AdaLossScaled
from ada_loss.core.config import TIMINGS
from helpers import assert_same_as_float32, dtype, plain_gradients
from toy import Twin, backward, batch, prepared, training
from twins import DECIBEL, assert_exact, weighted_sum

DECISIONS = 6
"""Places in `Net` where a shift is chosen."""

METHODS = ["fixed", "approx_range", "abs_range", "element_wise_range", "auto"]


@pytest.fixture
def gpu(monkeypatch):
    return pretended_gpu.pretend(monkeypatch)


class Net(chainer.Chain):
    """Convolutions of several kinds, normalization, a residual connection, fan-out and a matrix product.

    Nothing in it turns the other way because of rounding, as a ReLU would.
    """

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.stem = L.Convolution2D(3, 4, 3, pad=1)
            self.norm = L.BatchNormalization(4)
            self.grouped = L.Convolution2D(4, 4, 3, pad=1, groups=2)
            self.up = L.Deconvolution2D(4, 4, 2, stride=2)
            self.head = L.Linear(4 * 8 * 8, 6)

    def forward(self, x):
        h = F.tanh(self.norm(self.stem(x)))
        h = h + self.grouped(h)
        h = F.average_pooling_2d(self.up(h), 2)
        y = self.head(h)
        return y, F.matmul(y, y, transa=True) * 0.1


def images(rng):
    return rng.standard_normal((3, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_plain_chainer_up_to_rounding(gpu, rng, method):
    assert_exact(Net(), [images(rng)], loss_scale_method=method, decisions=DECISIONS, mixed16=1.0)
    assert gpu.transfers or method == "fixed"


def test_gradients_survive_where_they_would_underflow(gpu, rng):
    assert_exact(Net(), [images(rng)], mixed16=2.0**-18)


@pytest.mark.parametrize("method", METHODS)
def test_a_delayed_backward_waits_for_nothing_after_the_first_step(gpu, rng, method):
    with dtype("mixed16"):
        model = AdaLossScaled(Net(), method, timing="delayed", init_scale=2.0**10)
    optimizer = prepared(model, chainer.optimizers.SGD(1e-3))
    x = images(rng).astype(np.float16)
    for step in range(3):
        waits = gpu.transfers, gpu.looks
        loss = weighted_sum(model(x))
        model.cleargrads()
        loss.backward()
        assert ((gpu.transfers, gpu.looks) == waits) == bool(step)
        transfers = gpu.transfers
        optimizer.update()
        assert gpu.transfers - transfers == bool(step)
    assert optimizer.entry_scale.skipped == 0


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_is_that_of_float32_parameters_with_the_true_gradients(gpu, rng, method, timing):
    target = training(method=method, timing=timing)
    optimizer, reference = prepared(target), chainer.optimizers.MomentumSGD(0.05)
    twin = Twin(target)
    reference.setup(twin)
    with dtype("mixed16"):
        for _ in range(3):
            backward(target, batch(rng))
            twin.take_gradients(target)
            optimizer.update()
            reference.update()
            twin.assert_is(target)


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_step_that_overflows_is_skipped_and_lowers_the_entry_scale(gpu, rng, timing):
    target = training(timing=timing)
    optimizer = prepared(target)
    with dtype("mixed16"):
        backward(target, batch(rng))
        optimizer.update()
        (x, t) = batch(rng)
        before = target.model.ada_loss.policy.entry
        backward(target, (x, np.full_like(t, np.inf)))
        optimizer.update()
    assert optimizer.entry_scale.skipped == 1
    assert target.model.ada_loss.policy.entry != before


def test_sums_too_large_for_the_scale_of_a_layer_lower_it_within_a_few_steps(gpu, rng):
    narrow, wide = (L.Linear(4, 4) for _ in range(2))
    narrow.copyparams(wide)
    with dtype("mixed16"):
        model = AdaLossScaled(chainer.Sequential(narrow), "auto")
    for parameter in narrow.params():
        parameter.array = parameter.array.astype(np.float16)
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    # All gradients point the same way, so that those of the parameters are thousands of times as large.
    x = rng.uniform(1, 2, (5000, 4)).astype(np.float16)
    for _ in range(20):
        model.cleargrads()
        F.sum(model(x)).backward()
        optimizer.update()
    assert 0 < optimizer.entry_scale.skipped < 15
    model.cleargrads()
    F.sum(model(x)).backward()
    expected = plain_gradients(wide, lambda link: F.sum(link(x.astype(np.float32))))
    found = {path.removeprefix("/0"): array for path, array in model.true_gradients().items()}
    assert_same_as_float32(found, expected, db=DECIBEL)
