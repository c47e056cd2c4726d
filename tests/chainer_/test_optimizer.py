"""A prepared optimizer: the update is float32 Chainer's, whatever scales the gradients carry."""

import copy
import pickle
from functools import partial

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.chainer.parameters import ScaledParameter
from helpers import assert_same_bits, dtype
from toy import (
    SCALES,
    SIZE,
    Net,
    Training,
    backward,
    batch,
    compare,
    masters,
    prepared,
    training,
    twice,
    values,
)

# NumPy says so when something overflows, and here it often has to.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIMIZERS = {
    name: getattr(optimizers, name)
    for name in dir(optimizers)
    if isinstance(getattr(optimizers, name), type)
    and issubclass(getattr(optimizers, name), chainer.Optimizer)
}


def known_noise(xp, shape, dtype, hook, rule):
    return 0.01 * np.random.default_rng(rule.t).standard_normal(shape).astype(dtype)


HOOKS = {
    "WeightDecay": partial(hooks.WeightDecay, 0.1),
    "Lasso": partial(hooks.Lasso, 0.1),
    "GradientClipping": partial(hooks.GradientClipping, 0.01),
    "GradientHardClipping": partial(hooks.GradientHardClipping, -0.01, 0.01),
    "GradientNoise": partial(hooks.GradientNoise, 0.1, known_noise),
    "GradientLARS": partial(hooks.GradientLARS, 0.01, 0.1),
}


@pytest.fixture
def rng():
    return np.random.default_rng(20)


class TestUpdatesAreFloat32Chainers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_with_every_optimizer(self, rng, name):
        with dtype("mixed16"):
            target = training()
            compare(target, prepared(target, OPTIMIZERS[name]()), OPTIMIZERS[name](), batch(rng))

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_in_float32_bit_for_bit_with_a_model_that_was_never_wrapped(self, rng, name, scale):
        data = batch(rng)
        target = training("float32", init_scale=8)
        plain = Training(Net())
        plain.model.copyparams(target.model)
        plain.head.copyparams(target.head)
        optimizer, reference = prepared(target, OPTIMIZERS[name]()), OPTIMIZERS[name]().setup(plain)
        for _ in range(3):
            backward(target, data, scale)
            backward(plain, data)
            optimizer.update()
            reference.update()
        assert_same_bits(values(target), values(plain))

    @pytest.mark.parametrize("name", HOOKS)
    @pytest.mark.parametrize("timing", ["pre", "post"])
    def test_with_every_hook(self, rng, name, timing):
        def add(optimizer, target):
            optimizer.add_hook(HOOKS[name](), timing=timing)

        with dtype("mixed16"):
            target = training()
            compare(target, prepared(target), optimizers.MomentumSGD(0.05), batch(rng), add)

    @pytest.mark.parametrize("name", [name for name in HOOKS if name != "GradientClipping"])
    @pytest.mark.parametrize("timing", ["pre", "post"])
    def test_with_every_hook_on_the_update_rules(self, rng, name, timing):
        def add(optimizer, target):
            for parameter in target.params():
                parameter.update_rule.add_hook(HOOKS[name](), timing=timing)

        with dtype("mixed16"):
            target = training()
            compare(target, prepared(target), optimizers.MomentumSGD(0.05), batch(rng), add)

    def test_with_all_hooks_stacked(self, rng):
        def add(optimizer, target):
            for name in HOOKS:
                optimizer.add_hook(HOOKS[name]())
            optimizer.add_hook(hooks.GradientClipping(0.02), name="again", timing="post")
            for parameter in target.params():
                parameter.update_rule.add_hook(hooks.WeightDecay(0.2))
                parameter.update_rule.add_hook(hooks.Lasso(0.2), timing="post")

        with dtype("mixed16"):
            target = training()
            compare(target, prepared(target, optimizers.Adam()), optimizers.Adam(), batch(rng), add)

    def test_with_hooks_added_after_prepare_and_removed_again(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, None, hooks.WeightDecay(10.0))
            optimizer.remove_hook("WeightDecay")
            compare(target, optimizer, optimizers.MomentumSGD(0.05), batch(rng))

    @pytest.mark.parametrize("before", [True, False])
    def test_with_use_fp32_update_called_before_or_after_prepare(self, rng, before):
        with dtype("mixed16"):
            target = training()
            optimizer = optimizers.Adam()
            if before:
                optimizer.use_fp32_update()
            prepared(target, optimizer)
            if not before:
                optimizer.use_fp32_update()
            compare(target, optimizer, optimizers.Adam(), batch(rng))

    def test_with_a_float16_layer_outside_the_scope(self, rng):
        def add(optimizer, target):
            optimizer.add_hook(hooks.GradientClipping(0.1))

        with dtype("float16"):
            target = training("float16")
            assert target.head.W.dtype == np.float16
            compare(target, prepared(target), optimizers.MomentumSGD(0.05), batch(rng), add)

    def test_steps_too_small_for_float16_accumulate_in_the_masters(self, rng):
        path, moved = "/model/first/W", np.zeros((8, SIZE))
        with dtype("mixed16"):
            target = training()
            optimizer, data = prepared(target, optimizers.SGD(1e-6)), batch(rng)
            before, start = values(target)[path], masters(target)[path]
            for _ in range(20):
                backward(target, data)
                moved -= 1e-6 * target.model.true_gradients()["/first/W"]
                optimizer.update()
        assert (values(target)[path] == before).mean() > 0.9
        np.testing.assert_allclose(masters(target)[path] - start, moved, atol=20 * 2.0**-24)


class TestLossScales:
    """A scale that Chainer applies itself makes no difference: in float32 not one bit."""

    def updated(self, rng, configure, steps=4):
        target = training("float32")
        optimizer = prepared(target, optimizers.MomentumSGD(0.05), hooks.GradientClipping(0.1))
        configure(optimizer)
        for _ in range(steps):
            optimizer.update(target, *batch(rng))
        return optimizer, values(target)

    @pytest.mark.parametrize("scale", SCALES)
    def test_static_loss_scaling(self, scale):
        _, expected = self.updated(np.random.default_rng(1), lambda optimizer: None)
        _, actual = self.updated(
            np.random.default_rng(1), lambda optimizer: optimizer.loss_scaling(scale=scale)
        )
        assert_same_bits(actual, expected)

    def test_a_scale_that_is_no_power_of_two(self):
        _, expected = self.updated(np.random.default_rng(1), lambda optimizer: None)
        _, actual = self.updated(np.random.default_rng(1), lambda optimizer: optimizer.set_loss_scale(1000.0))
        for path in expected:
            np.testing.assert_allclose(actual[path], expected[path], rtol=1e-4, atol=1e-7)

    def test_dynamic_loss_scaling(self):
        _, expected = self.updated(np.random.default_rng(1), lambda optimizer: None)
        optimizer, actual = self.updated(np.random.default_rng(1), lambda optimizer: optimizer.loss_scaling())
        assert optimizer._loss_scale == 16
        assert_same_bits(actual, expected)

    def test_dynamic_loss_scaling_halves_on_overflow(self, rng):
        target = training("float32")
        optimizer = prepared(target)
        optimizer.loss_scaling(interval=2)
        for magnitude in (1, 1, np.inf, 1):
            optimizer.update(target, *batch(rng, magnitude=magnitude))
        assert optimizer._loss_scale == pytest.approx(2 * 2**0.5)
        assert (optimizer.t, optimizer.entry_scale.skipped) == (3, 1)

    def test_dynamic_loss_scaling_with_a_parameter_that_was_never_initialized(self, rng):
        target = training("float32")
        with target.init_scope():
            target.unused = L.Linear(None, 2)
        optimizer = prepared(target)
        optimizer.loss_scaling()
        optimizer.update(target, *batch(rng))
        assert optimizer.t == 1 and target.unused.W.array is None

    @pytest.mark.parametrize("scale", SCALES)
    def test_standard_updater_with_a_loss_scale(self, rng, scale):
        x, t = batch(np.random.default_rng(3), 8)
        data = chainer.datasets.TupleDataset(x, t)
        results = []
        for loss_scale in (None, scale):
            target = training("float32")
            iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
            updater = chainer.training.StandardUpdater(
                iterator, prepared(target, None, hooks.WeightDecay(0.1)), loss_scale=loss_scale
            )
            for _ in range(4):
                updater.update()
            results.append(values(target))
        assert_same_bits(*results)


class TestWhichParametersAreUpdated:
    def test_frozen_parameters_stay(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, None, hooks.WeightDecay(0.1))
            target.model.first.disable_update()
            target.head.b.update_rule.enabled = False
            before = values(target)
            optimizer.update(target, *batch(rng))
        changed = {path for path, array in values(target).items() if not np.array_equal(array, before[path])}
        assert not {"/model/first/W", "/model/first/b", "/head/b"} & changed
        assert {"/model/shared/W", "/head/W"} <= changed

    def test_parameters_without_gradient_decay_as_chainers_do(self, rng):
        with dtype("mixed16"):
            target = training()
            with target.init_scope():
                target.spare = L.Linear(2, 2)
            optimizer = prepared(target, optimizers.SGD(1.0), hooks.WeightDecay(0.25))
            before = masters(target)
            optimizer.update(target, *batch(rng))
        np.testing.assert_array_equal(target.spare.W.master, before["/spare/W"] * np.float32(0.75))
        assert target.spare.W.grad is None

    def test_uninitialized_parameters_wait_until_they_exist(self, rng):
        with dtype("mixed16"):
            target = Training(AdaLossScaled(Net(None)))
            with target.init_scope():
                target.spare = L.Linear(None, 2)
            optimizer = prepared(target, optimizers.Adam(), hooks.WeightDecay(0.1))
            for _ in range(2):
                optimizer.update(target, *batch(rng))
        assert target.spare.W.array is None
        assert target.model.first.W.master.shape == (8, SIZE)

    def test_a_parameter_that_appears_after_prepare_is_updated_in_float32_too(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target)
            with target.init_scope():
                target.late = L.Linear(2, 2)
            for parameter in target.late.params():
                parameter.update_rule = optimizer.create_update_rule()
            optimizer.add_hook(hooks.WeightDecay(0.1))
            optimizer.update(target, *batch(rng))
        assert target.late.W.master.dtype == np.float32

    def test_a_link_registered_twice_is_updated_as_often_as_chainer_updates_it(self, rng):
        target, plain = AdaLossScaled(twice()), twice()
        x, _ = batch(rng)
        optimizer, reference = prepared(target, optimizers.MomentumSGD(0.05)), optimizers.MomentumSGD(0.05)
        reference.setup(plain).add_hook(hooks.WeightDecay(0.1))
        optimizer.add_hook(hooks.WeightDecay(0.1))
        for _ in range(3):
            optimizer.update(lambda: F.sum(target(x) ** 2))
            reference.update(lambda: F.sum(plain(x) ** 2))
        assert_same_bits(values(target), values(plain))

    def test_a_float16_link_registered_twice_keeps_one_master(self, rng):
        with dtype("mixed16"):
            layer = L.Linear(SIZE, SIZE)
            target = AdaLossScaled(chainer.Sequential(layer, F.relu, layer))
            optimizer = prepared(target, None, hooks.WeightDecay(0.1))
            x, _ = batch(rng)
            target.cleargrads()
            F.sum(target(x)).backward(loss_scale=4)
            gradients = target.true_gradients()
            optimizer.update()
        assert layer.W.array.dtype == np.float16 and layer.W.master.dtype == np.float32
        np.testing.assert_array_equal(layer.W.array, layer.W.master.astype(np.float16))
        assert_same_bits(target.true_gradients(), gradients)

    def test_gradients_are_the_true_ones_again_after_the_update(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, None, hooks.GradientClipping(1e-3))
            backward(target, batch(rng), 64.0)
            before = target.model.true_gradients()
            optimizer.update()
        assert_same_bits(target.model.true_gradients(), before)

    def test_masters_survive_an_update_that_fails_half_way(self, rng):
        class Failing:
            name, timing = "failing", "pre"

            def __call__(self, optimizer):
                raise KeyError("a bug in a hook")

        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, None, Failing())
            before = values(target)
            with pytest.raises(KeyError):
                optimizer.update(target, *batch(rng))
            assert_same_bits(values(target), before)
            assert target.model.first.W.array.dtype == np.float16
            optimizer.remove_hook("failing")
            optimizer.update(target, *batch(rng))


class TestPrepare:
    @pytest.mark.parametrize("precision", ["float32", "mixed16"])
    @pytest.mark.parametrize("hook", [None, *HOOKS])
    def test_an_unprepared_optimizer_fails_at_its_first_update_and_changes_nothing(
        self, rng, precision, hook
    ):
        with dtype(precision):
            target = training(precision)
            optimizer = optimizers.MomentumSGD(0.05).setup(target)
            if hook:
                optimizer.add_hook(HOOKS[hook]())
            before = values(target)
            with pytest.raises(
                RuntimeError, match=r"still scaled: call ada_loss.chainer.prepare\(optimizer\)"
            ):
                optimizer.update(target, *batch(rng))
        assert_same_bits(values(target), before)
        assert optimizer.t == 0

    def test_preparing_after_that_failure_mends_it(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = optimizers.MomentumSGD(0.05).setup(target)
            with pytest.raises(RuntimeError):
                optimizer.update(target, *batch(rng))
            compare(target, prepare(optimizer), optimizers.MomentumSGD(0.05), batch(rng))

    def test_preparing_twice_is_preparing_once(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target)
            assert prepare(optimizer) is optimizer
            compare(target, optimizer, optimizers.MomentumSGD(0.05), batch(rng))

    def test_it_comes_after_setup(self):
        with pytest.raises(ValueError, match=r"optimizer.setup\(model\) before"):
            prepare(optimizers.SGD())

    def test_it_needs_a_wrapped_model(self):
        with pytest.raises(ValueError, match="holds no AdaLossScaled"):
            prepare(optimizers.SGD().setup(L.Linear(2, 2)))

    def test_the_optimizer_can_be_set_up_anew_with_another_wrapped_model(self, rng):
        with dtype("mixed16"):
            optimizer = prepared(training())
            target = training()
            optimizer.setup(target)
            compare(target, optimizer, optimizers.MomentumSGD(0.05), batch(rng))

    def test_but_not_with_a_plain_one(self):
        optimizer = prepared(training())
        with pytest.raises(ValueError, match="holds no AdaLossScaled"):
            optimizer.setup(L.Linear(2, 2))

    def test_it_keeps_the_optimizer_what_it_was(self):
        optimizer = prepared(training(), optimizers.Adam(alpha=0.5))
        assert isinstance(optimizer, optimizers.Adam) and optimizer.alpha == 0.5

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_a_copy_of_the_optimizer_and_its_model_is_prepared_too(self, rng, duplicate):
        with dtype("mixed16"):
            target = training()
            optimizer, other = duplicate((prepared(target), target))
            assert optimizer.target is other
            compare(other, optimizer, optimizers.MomentumSGD(0.05), batch(rng))

    def test_a_hand_written_update_needs_no_optimizer(self, rng):
        with dtype("mixed16"):
            model = training().model
            x, _ = batch(rng)
            before = model.first.W.array.copy()
            model.cleargrads()
            F.sum(model(x) ** 2).backward()
            for path, gradient in model.true_gradients().items():
                assert gradient.dtype == np.float32, path
            for parameter in model.params():
                parameter.array -= (0.1 * parameter.grad).astype(parameter.dtype)
        assert not np.array_equal(model.first.W.array, before)
        assert all(isinstance(parameter, ScaledParameter) for parameter in model.params())
