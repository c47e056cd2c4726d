"""Steps that add up several backward passes: an update ends a step, and every pass gets shifts of its own."""

import copy
import logging

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.core.policy import STEADY
from helpers import dtype, signal_to_noise

TASKS = {"large": 1e-3, "tiny": 1e-9, "middle": 1e-6}
"""What the loss of each counts."""

LATE = [
    {"timing": "delayed"},
    {"update_per_n_iteration": 4},
    {"timing": "delayed", "update_per_n_iteration": 3},
]


@pytest.fixture(autouse=True)
def _without_warnings(caplog):
    caplog.set_level(logging.ERROR)


class Net(chainer.Chain):
    """A trunk and a head for each task; heads of one kind can be shared."""

    def __init__(self, shared=False):
        super().__init__(trunk=L.Linear(6, 16))
        self.heads = {task: "head" if shared else task for task in TASKS}
        with self.init_scope():
            for name in dict.fromkeys(self.heads.values()):
                setattr(self, name, L.Linear(16, 3))

    def forward(self, x, task):
        h = F.tanh(self.trunk(x))
        return self[self.heads[task]](h + F.tanh(h))


def loss_of(model, x, task):
    y = model(x, task)
    return F.sum(F.cast(y, "f") ** 2) * np.float32(TASKS[task])


def pair(shared=False, **settings):
    """A scaled model in mixed16 with a prepared optimizer, and the same in float32."""
    with dtype("mixed16"):
        model = AdaLossScaled(Net(shared), **settings)
    wide = Net(shared)
    wide.copyparams(model)
    return model, prepare(chainer.optimizers.SGD(0.0).setup(model)), wide


def parameters(link, task):
    return {path: p for path, p in link.namedparams() if path.startswith((f"/{task}", "/head", "/trunk"))}


def assert_right(model, wide, tasks):
    """Every parameter has float32's gradient."""
    for task in tasks:
        expected = parameters(wide, task)
        for path, parameter in parameters(model, task).items():
            assert signal_to_noise(parameter.grad, expected[path].grad) > 35, (task, path)


def run(model, wide, optimizer, rng, tasks):
    """A step that adds up the gradients of some tasks."""
    model.cleargrads()
    wide.cleargrads()
    for task in tasks:
        x = rng.standard_normal((16, 6)).astype("e")
        loss_of(model, x, task).backward()
        loss_of(wide, x.astype("f"), task).backward()
    assert_right(model, wide, tasks)
    optimizer.update()


@pytest.mark.parametrize("settings", LATE)
@pytest.mark.parametrize("shared", [False, True])
class TestTasks:
    def test_in_the_same_order_in_every_step(self, settings, shared, rng):
        model, optimizer, wide = pair(shared, **settings)
        for _ in range(12):
            run(model, wide, optimizer, rng, list(TASKS))
        assert optimizer.entry_scale.skipped <= 2

    def test_in_a_random_order(self, settings, shared, rng):
        model, optimizer, wide = pair(shared, **settings)
        for _ in range(20):
            run(model, wide, optimizer, rng, rng.permutation(list(TASKS)))
        assert optimizer.entry_scale.skipped <= 2

    def test_of_which_some_come_in_a_step(self, settings, shared, rng):
        model, optimizer, wide = pair(shared, **settings)
        run(model, wide, optimizer, rng, list(TASKS))
        for _ in range(20):
            tasks = rng.permutation(list(TASKS))[: rng.integers(1, 4)]
            run(model, wide, optimizer, rng, tasks)
        assert optimizer.entry_scale.skipped <= 2


@pytest.mark.parametrize("settings", LATE)
def test_micro_batches_get_the_gradients_of_current_timing(settings, rng):
    late, optimizer, _ = pair(**settings)
    current, others, _ = pair()
    current.copyparams(late)
    for _ in range(6):
        late.cleargrads()
        current.cleargrads()
        for _ in range(4):
            x = rng.standard_normal((16, 6)).astype("e")
            for model in (late, current):
                loss_of(model, x, "middle").backward()
        for path, gradient in late.true_gradients().items():
            np.testing.assert_array_equal(gradient, current.true_gradients()[path], err_msg=path)
        optimizer.update()
        others.update()


@pytest.mark.parametrize("settings", LATE)
def test_a_generator_and_a_critic_that_is_updated_more_often(settings, rng):
    with dtype("mixed16"):
        critic = AdaLossScaled(chainer.Sequential(L.Linear(6, 8), F.tanh, L.Linear(8, 1)), **settings)
        generator = chainer.Sequential(L.Linear(4, 8), F.tanh, L.Linear(8, 6))
        generator = AdaLossScaled(generator, **settings, output_dtype=None)
    models = {"critic": critic, "generator": generator}
    optimizers = {name: prepare(chainer.optimizers.SGD(0.0).setup(model)) for name, model in models.items()}
    wide = {name: _in_float32(model) for name, model in models.items()}

    def losses(critic, generator, real, noise):
        fake = generator(noise)
        judged = [F.cast(critic(x), "f") for x in (real, fake)]
        return [F.sum(judged[0]) * np.float32(1e-4), F.sum(judged[1] ** 2) * np.float32(1e-8)]

    for step in range(12):
        name = "generator" if step % 3 == 2 else "critic"
        real, noise = (rng.standard_normal((8, n)).astype("e") for n in (6, 4))
        for each, kind in ((models, "e"), (wide, "f")):
            each[name].cleargrads()
            found = losses(each["critic"], each["generator"], real.astype(kind), noise.astype(kind))
            for loss in found[1:] if name == "generator" else found:
                loss.backward()
        for path, gradient in models[name].true_gradients().items():
            assert signal_to_noise(gradient, dict(wide[name].namedparams())[path].grad) > 35, (step, path)
        optimizers[name].update()
    assert all(optimizer.entry_scale.skipped <= 2 for optimizer in optimizers.values())


@pytest.mark.parametrize("settings", LATE)
def test_without_an_optimizer_gradients_that_are_cleared_end_a_step(settings, rng):
    with dtype("mixed16"):
        model = AdaLossScaled(Net(), **settings)
    wide = Net()
    wide.copyparams(model)
    for _ in range(8):
        model.cleargrads()
        wide.cleargrads()
        tasks = rng.permutation(list(TASKS))
        for task in tasks:
            x = rng.standard_normal((16, 6)).astype("e")
            loss_of(model, x, task).backward()
            loss_of(wide, x.astype("f"), task).backward()
        assert_right(model, wide, tasks)


def test_steps_of_one_pass_are_delayed_again_after_a_while(rng):
    model, optimizer, wide = pair(timing="delayed")
    policy = model.ada_loss.policy
    run(model, wide, optimizer, rng, list(TASKS))
    assert policy.adds_passes
    for _ in range(STEADY):
        assert policy.adds_passes
        run(model, wide, optimizer, rng, ["large"])
    assert not policy.adds_passes


def test_a_resumed_training_measures_as_the_uninterrupted_one(rng, tmp_path):
    model, optimizer, wide = pair(timing="delayed")
    run(model, wide, optimizer, rng, list(TASKS))
    chainer.serializers.save_npz(tmp_path / "model.npz", model)
    resumed, again, _ = pair(timing="delayed")
    chainer.serializers.load_npz(tmp_path / "model.npz", resumed)
    assert resumed.ada_loss.policy.adds_passes
    x = rng.standard_normal((16, 6)).astype("e")
    for each in (model, resumed):
        each.cleargrads()
        loss_of(each, x, "tiny").backward()
    found = [each.true_gradients() for each in (model, resumed)]
    for path, gradient in found[0].items():
        np.testing.assert_array_equal(found[1][path], gradient, err_msg=path)


def _in_float32(model):
    wide = copy.deepcopy(model)
    for parameter in wide.params():
        parameter.array = parameter.array.astype("f")
    return wide
