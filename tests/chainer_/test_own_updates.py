"""Optimizers with an `update` of their own: it runs as it is, and the steps that it takes are true ones."""

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, prepare
from helpers import assert_same_bits, dtype, signal_to_noise
from toy import values

SMALL = 2.0**-18


class Sharpness(chainer.optimizers.SGD):
    """Two passes a step: the second where the loss is larger."""

    def update(self, lossfun=None, *args, **kwargs):
        if lossfun is not None:
            parameters = list(self.target.params())
            self.target.cleargrads()
            lossfun(*args, **kwargs).backward()
            norm = np.sqrt(sum(float((p.grad.astype("d") ** 2).sum()) for p in parameters))
            before = [p.array.copy() for p in parameters]
            for p in parameters:
                p.array[...] = p.array + 0.05 * p.grad / norm
            self.target.cleargrads()
            lossfun(*args, **kwargs).backward()
            for p, array in zip(parameters, before, strict=True):
                p.array[...] = array
        super().update()


class Extragradient(chainer.optimizers.MomentumSGD):
    """Two steps of Chainer's in one, the second from where the first began."""

    def update(self, lossfun=None, *args, **kwargs):
        before = [p.array.copy() for p in self.target.params()]
        super().update(lossfun, *args, **kwargs)
        self.target.cleargrads()
        lossfun(*args, **kwargs).backward()
        for p, array in zip(self.target.params(), before, strict=True):
            p.array[...] = array
        super().update()


class Sometimes(chainer.optimizers.Adam):
    """Leaves every other step out."""

    asked = 0

    def update(self, lossfun=None, *args, **kwargs):
        self.asked += 1
        if self.asked % 2:
            super().update(lossfun, *args, **kwargs)


class Accumulating(chainer.optimizers.Adam):
    """Adds up the gradients of three batches before it takes a step."""

    asked = 0

    def update(self, lossfun=None, *args, **kwargs):
        if self.asked % 3 == 0:
            self.target.cleargrads()
        lossfun(*args, **kwargs).backward()
        self.asked += 1
        if self.asked % 3 == 0:
            super().update()


class LookingAhead(chainer.optimizers.SGD):
    """Goes back half the way after every third step."""

    slow = None

    def update(self, lossfun=None, *args, **kwargs):
        if self.slow is None:
            self.slow = [p.array.copy() for p in self.target.params()]
        super().update(lossfun, *args, **kwargs)
        if self.t % 3 == 0:
            for p, slow in zip(self.target.params(), self.slow, strict=True):
                slow += 0.5 * (p.array - slow)
                p.array[...] = slow


class Clipping(chainer.optimizers.SGD):
    """Clips the gradients that it has computed by hand."""

    def update(self, lossfun=None, *args, **kwargs):
        if lossfun is not None:
            self.target.cleargrads()
            lossfun(*args, **kwargs).backward()
        for p in self.target.params():
            p.grad = np.clip(p.grad, -0.01, 0.01)
        super().update()


class Counting(chainer.optimizers.MomentumSGD):
    """Counts how often it is asked."""

    asked = 0

    def update(self, *args, **kwargs):
        self.asked += 1
        return super().update(*args, **kwargs)


class Mixin:
    def update(self, *args, **kwargs):
        self.asked = getattr(self, "asked", 0) + 1
        return super().update(*args, **kwargs)


class Mixed(Mixin, chainer.optimizers.Adam):
    pass


KINDS = [Sharpness, Extragradient, Sometimes, Accumulating, LookingAhead, Clipping, Counting, Mixed]


class Net(chainer.Chain):
    def __init__(self):
        super().__init__(a=L.Linear(4, 8), b=L.Linear(8, 3))

    def forward(self, x):
        return self.b(F.tanh(self.a(x)))


def loss_of(model, x, weight=1.0):
    return F.sum(F.sin(F.cast(model(x), "f")) ** 2) * np.float32(weight)


def trained(optimizer, model, rng, steps=7, weight=1.0):
    for _ in range(steps):
        x = rng.standard_normal((8, 4)).astype(model.a.W.dtype)
        optimizer.update(loss_of, model, x, weight)
    return values(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timing", ["current", "delayed"])
def test_in_float32_the_training_is_plain_chainers_bit_for_bit(kind, timing):
    plain = Net()
    scaled = AdaLossScaled(copy.deepcopy(plain), timing=timing)
    expected = trained(kind(0.05).setup(plain), plain, np.random.default_rng(1))
    optimizer = prepare(kind(0.05).setup(scaled))
    found = trained(optimizer, scaled, np.random.default_rng(1))
    assert_same_bits(found, expected)
    assert isinstance(optimizer, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timing", ["current", "delayed"])
def test_in_mixed16_it_is_float32s_as_far_as_weights_are_rounded(kind, timing):
    with dtype("mixed16"):
        scaled = AdaLossScaled(Net(), timing=timing)
    wide = Net()
    wide.copyparams(scaled)
    rate = 0.05 if kind in (Sometimes, Accumulating, Mixed) else 0.05 / SMALL
    before = values(wide)
    expected = trained(kind(rate).setup(wide), wide, np.random.default_rng(1), weight=SMALL)
    optimizer = prepare(kind(rate).setup(scaled))
    found = trained(optimizer, scaled, np.random.default_rng(1), weight=SMALL)
    assert optimizer.entry_scale.skipped == 0
    for path, array in expected.items():
        moved = array - before[path]
        if np.abs(moved).max() > 1e-3:
            assert signal_to_noise(found[path] - before[path], moved) > 20, path


@pytest.mark.parametrize("kind", KINDS)
def test_counters_are_those_of_a_plain_optimizer(kind):
    optimizers = []
    for make in (lambda net: net, AdaLossScaled):
        model = make(Net())
        optimizer = kind(0.05).setup(model)
        if isinstance(model, AdaLossScaled):
            prepare(prepare(optimizer))
        trained(optimizer, model, np.random.default_rng(1))
        optimizers.append(optimizer)
    assert optimizers[0].t == optimizers[1].t
    assert getattr(optimizers[0], "asked", 0) == getattr(optimizers[1], "asked", 0)


@pytest.mark.parametrize("kind", [Sharpness, Counting])
def test_gradients_that_were_computed_by_hand_are_taken_too(kind):
    plain = Net()
    scaled, found = AdaLossScaled(copy.deepcopy(plain)), []
    for model in (plain, scaled):
        optimizer = kind(0.05).setup(model)
        if model is scaled:
            prepare(optimizer)
        model.cleargrads()
        loss_of(model, np.ones((2, 4), "f")).backward()
        optimizer.update()
        found.append(values(model))
    assert_same_bits(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_whose_gradients_are_not_finite_is_skipped(kind):
    model = AdaLossScaled(Net())
    optimizer = prepare(kind(0.05).setup(model))
    trained(optimizer, model, np.random.default_rng(1), steps=2)
    before = values(model)
    for _ in range(6):
        with np.errstate(all="ignore"):
            optimizer.update(loss_of, model, np.full((2, 4), np.nan, "f"))
    assert optimizer.entry_scale.skipped
    if kind not in (Clipping, LookingAhead):
        # Those two write to the parameters, or to their gradients, by hand.
        assert_same_bits(values(model), before)


def test_a_copy_and_a_pickle_are_prepared_as_well():
    model = AdaLossScaled(Net())
    optimizer = prepare(Counting(0.05).setup(model))
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        trained(again, again.target, np.random.default_rng(1))
        assert type(again) is type(optimizer) and again.asked == 7


def test_an_optimizer_that_holds_the_one_that_takes_the_step_leaves_it_to_that():
    class Ahead(chainer.Optimizer):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def setup(self, link):
            self.inside.setup(link)
            return super().setup(link)

        def update(self, lossfun=None, *args, **kwargs):
            self.inside.update(lossfun, *args, **kwargs)

    plain = Net()
    scaled = AdaLossScaled(copy.deepcopy(plain))
    expected = trained(Ahead(chainer.optimizers.Adam()).setup(plain), plain, np.random.default_rng(1))
    optimizer = Ahead(chainer.optimizers.Adam()).setup(scaled)
    assert prepare(optimizer) is optimizer
    assert_same_bits(trained(optimizer, scaled, np.random.default_rng(1)), expected)


class ByHand(chainer.optimizers.SGD):
    def update(self, lossfun=None, *args, **kwargs):
        for p in self.target.params():
            p.array -= self.lr * p.grad


class OneByOne(chainer.optimizers.SGD):
    def update(self, lossfun=None, *args, **kwargs):
        for p in self.target.params():
            p.update()


@pytest.mark.parametrize("kind", [ByHand, OneByOne])
def test_an_update_that_takes_no_step_of_chainers_is_refused(kind):
    optimizer = kind(0.1).setup(AdaLossScaled(Net()))
    with pytest.raises(ValueError, match=f"{kind.__name__}.update never calls super"):
        prepare(optimizer)


def test_so_is_an_optimizer_without_any():
    class Nothing(chainer.Optimizer):
        def update(self, lossfun=None, *args, **kwargs):
            pass

    with pytest.raises(TypeError, match="Nothing"):
        prepare(Nothing().setup(AdaLossScaled(Net())))


def test_one_that_calls_chainers_step_by_its_name_is_told_how_to():
    class ByName(chainer.optimizers.SGD):
        def update(self, lossfun=None, *args, **kwargs):
            chainer.GradientMethod.update(self, lossfun, *args, **kwargs)

        def other(self):
            super().update()

    model = AdaLossScaled(Net())
    optimizer = prepare(ByName(0.1).setup(model))
    before = values(model)
    with pytest.raises(RuntimeError, match=r"super\(\).update"):
        optimizer.update(loss_of, model, np.ones((2, 4), "f"))
    assert_same_bits(values(model), before)
