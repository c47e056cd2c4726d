"""A training goes on under a prepared optimizer that began without one, in this process or in a snapshot."""

import io

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers, serializers

from ada_loss.chainer import AdaLossScaled, prepare
from helpers import dtype

MAKERS = {
    name: found
    for name, found in vars(optimizers).items()
    if isinstance(found, type) and issubclass(found, chainer.GradientMethod)
}
# Its default epsilon is none in float16, so Chainer refuses it.
MAKERS["RMSprop"] = lambda: optimizers.RMSprop(eps=1e-4)


def net(kind):
    np.random.seed(0)
    with dtype(kind):
        return chainer.Chain(inside=chainer.Sequential(L.Linear(4, 6), F.tanh, L.Linear(6, 3)))


def scaled(model):
    """The model, with scaled gradients from now on."""
    inside = AdaLossScaled(model.inside)
    if inside is not model.inside:
        del model.inside
        with model.init_scope():
            model.inside = inside
    return model


def step(optimizer, model, x):
    optimizer.update(lambda: F.mean(F.cast(model.inside(x), "float32") ** 2))


def states(target):
    """Each state array of each update rule, by path and name."""
    return {
        (path, name): value
        for path, parameter in target.namedparams()
        for name, value in parameter.update_rule.state.items()
        if hasattr(value, "dtype") and value.dtype.kind == "f"
    }


@pytest.fixture
def x():
    return np.random.default_rng(26).standard_normal((5, 4)).astype(np.float16)


def in_float16(make, x, steps=4):
    """A model and its optimizer after some steps of Chainer's own in float16."""
    model = net("float16")
    optimizer = make().setup(model)
    for _ in range(steps):
        step(optimizer, model, x)
    return model, optimizer


def assert_widened(found, before):
    assert found.keys() == before.keys()
    for name, value in found.items():
        assert value.dtype == np.float32, name
        np.testing.assert_array_equal(value, before[name].astype(np.float32), err_msg=str(name))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_state_that_a_snapshot_holds_in_float16_becomes_float32(name, x):
    plain, before = in_float16(MAKERS[name], x)
    model = scaled(net("mixed16"))
    optimizer = prepare(MAKERS[name]().setup(model))
    for saved, loaded in ((plain, model), (before, optimizer)):
        file = io.BytesIO()
        serializers.save_npz(file, saved)
        file.seek(0)
        serializers.load_npz(file, loaded)
    assert_widened(states(model), states(plain))
    step(optimizer, model, x)
    assert all(value.dtype == np.float32 for value in states(model).values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_state_of_an_optimizer_that_is_prepared_in_the_middle_becomes_float32(name, x):
    model, optimizer = in_float16(MAKERS[name], x)
    before = {name: value.copy() for name, value in states(model).items()}
    scaled(model)
    prepare(optimizer)
    assert_widened(states(model), before)


def test_float32_copies_of_an_optimizer_become_masters(x):
    model = net("float16")
    optimizer = optimizers.Adam(1e-6).setup(model)
    optimizer.use_fp32_update()
    for parameter in model.params():
        parameter.update_rule.use_fp32_update()
    for _ in range(4):
        step(optimizer, model, x)
    copies = {path: p.update_rule._fp32_param.array.copy() for path, p in model.namedparams()}
    bias = model.inside[0].b
    bias.array[1] = copies["/inside/0/b"][1] = 7
    assert any((copies[path] != p.array).any() for path, p in model.namedparams())
    scaled(model)
    prepare(optimizer)
    optimizer.update(lambda: F.mean(model.inside(x)) * np.float32(0))
    for path, parameter in model.namedparams():
        # Adam's momentum goes on, and moves each weight by about its rate.
        np.testing.assert_allclose(parameter.master, copies[path], atol=2e-6, err_msg=path)
