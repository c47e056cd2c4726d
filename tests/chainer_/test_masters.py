"""Updates run on float32 masters, with float32 gradients that exist no longer than somebody needs them."""

import gc
import tracemalloc
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer import masters as on_masters
from ada_loss.chainer.gradient import ScaledGradient
from ada_loss.chainer.masters import true_gradients_on_masters
from helpers import assert_same_bits, dtype
from toy import SIZE, Net, a_parameter, batch, masters, prepared, training, twice, values


@pytest.fixture
def rng():
    return np.random.default_rng(21)


class TestTrueGradientsOnMasters:
    def test_a_float16_parameter_is_its_float32_master(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 30), 1.0)
        with true_gradients_on_masters([held]):
            assert held.dtype == held.array.dtype == held.grad.dtype == np.float32
            assert held.grad.tolist() == [2.0**-30, 2.0**-29, 3 * 2.0**-30]
            held.array += held.grad
        assert held.array.dtype == np.float16 and held.array.tolist() == [1, 1, 1]
        assert held.master.dtype == np.float32

    def test_the_float16_array_stays_the_same_object(self):
        held = a_parameter()
        array = held.array
        with true_gradients_on_masters([held]):
            held.array[...] = 5
        assert held.array is array and array.tolist() == [5, 5, 5]

    def test_float32_and_float64_parameters_stay_what_they_are(self):
        for kind in ("float32", "float64"):
            held = a_parameter(kind)
            held.receive(ScaledGradient(np.ones(3, kind), 2), 1.0)
            with true_gradients_on_masters([held]):
                assert held.array.dtype == held.grad.dtype == kind
            assert held.master is None

    def test_a_gradient_that_was_read_before_is_not_modified(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 1), 1.0)
        read = held.grad
        with true_gradients_on_masters([held]):
            held.grad *= 2
            assert held.grad.tolist() == [1, 2, 3]
        assert held.grad is read and read.tolist() == [0.5, 1, 1.5]

    def test_a_gradient_that_only_the_update_asks_for_is_given_up_after_it(self):
        held, seen = a_parameter(), []
        held.update_rule = chainer.optimizers.SGD().create_update_rule()
        held.update_rule.add_hook(lambda rule, p: seen.append(weakref.ref(p.grad)), "look")
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 30), 1.0)
        with true_gradients_on_masters([held]):
            held.update()
            assert seen[0]() is None
            assert held.grad.tolist() == [2.0**-30, 2.0**-29, 3 * 2.0**-30]

    @pytest.mark.parametrize("looked_at", [True, False])
    def test_a_gradient_that_is_looked_at_before_or_kept_stays_as_the_update_left_it(self, looked_at):
        held = a_parameter()
        held.update_rule = chainer.optimizers.SGD().create_update_rule()
        held.update_rule.add_hook(chainer.optimizer_hooks.WeightDecay(1.0))
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 1), 1.0)
        with true_gradients_on_masters([held], keep=() if looked_at else {id(held)}):
            if looked_at:
                held.grad *= 2
            held.update()
            assert held.grad.tolist() == ([2, 3, 4] if looked_at else [1.5, 2, 2.5])
        assert held.grad.tolist() == [0.5, 1, 1.5]

    def test_gradients_are_in_flight_again_afterwards(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 30), 1.0)
        with true_gradients_on_masters([held]):
            held.grad[...] = 0
        assert held.true_gradient().tolist() == [2.0**-30, 2.0**-29, 3 * 2.0**-30]
        assert held.arrays()[0].dtype == np.float16

    def test_too_little_memory_for_a_master_leaves_everything_as_it_was(self, monkeypatch):
        held = [a_parameter() for _ in range(4)]
        for parameter in held:
            parameter.receive(ScaledGradient(np.float16([1, 2, 3]), 30), 1.0)
        arrays, reconciled = [parameter.array for parameter in held], on_masters._reconciled

        def short_of_memory(master, half):
            if half is arrays[2]:
                raise MemoryError
            return reconciled(master, half)

        monkeypatch.setattr(on_masters, "_reconciled", short_of_memory)
        with pytest.raises(MemoryError), true_gradients_on_masters(held):
            pass
        for parameter, array in zip(held, arrays, strict=True):
            assert parameter.array is array and array.tolist() == [1, 1, 1]
            assert parameter.true_gradient().tolist() == [2.0**-30, 2.0**-29, 3 * 2.0**-30]
            assert parameter.arrays()[0].dtype == np.float16
            parameter.update_rule = optimizers.SGD().create_update_rule()
            with pytest.raises(RuntimeError, match=r"prepare\(optimizer\)"):
                parameter.update()

    @pytest.mark.parametrize("short", range(3))
    def test_memory_that_is_short_at_the_end_of_an_update_leaves_the_others_updated(self, short, monkeypatch):
        held = [a_parameter() for _ in range(3)]
        for parameter in held:
            parameter.receive(ScaledGradient(np.float16([1, 2, 3]), 0), 1.0)
        arrays, cast = [parameter.array for parameter in held], on_masters.cast

        def short_of_memory(array, dtype):
            if array is held[short].master and dtype == np.float16:
                raise MemoryError
            return cast(array, dtype)

        with pytest.raises(MemoryError), true_gradients_on_masters(held):
            for parameter in held:
                parameter.array += 1
            monkeypatch.setattr(on_masters, "cast", short_of_memory)
        for index, (parameter, array) in enumerate(zip(held, arrays, strict=True)):
            assert parameter.array is array and array.tolist() == [2 - (index == short)] * 3
            assert parameter.true_gradient().tolist() == [1, 2, 3]
            parameter.update_rule = optimizers.SGD().create_update_rule()
            with pytest.raises(RuntimeError, match=r"prepare\(optimizer\)"):
                parameter.update()


class TestMastersFollow:
    """Whoever changes a float16 parameter behind the optimizer's back changes the master as well."""

    def changed(self, rng, change):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, optimizers.SGD(0.0))
            optimizer.update(target, *batch(rng))
            parameter = target.model.first.W
            parameter.master += np.float32(2**-14) * np.abs(parameter.master)
            parameter.array[...] = parameter.master.astype(np.float16)
            before = masters(target)["/model/first/W"]
            change(target)
            optimizer.update(target, *batch(rng))
        return parameter, before

    def test_a_change_in_place_reaches_the_elements_that_changed(self, rng):
        def change(target):
            target.model.first.W.array[0] = 0.5

        parameter, before = self.changed(rng, change)
        assert (parameter.master[0] == 0.5).all() and (parameter.array[0] == 0.5).all()
        np.testing.assert_array_equal(parameter.master[1:], before[1:])

    def test_another_array(self, rng):
        def change(target):
            target.model.first.W.array = np.full((8, SIZE), 0.25, np.float16)

        parameter, _ = self.changed(rng, change)
        assert (parameter.master == 0.25).all()

    def test_copyparams(self, rng):
        with dtype("mixed16"):
            other = Net()
        parameter, _ = self.changed(rng, lambda target: target.model.copyparams(other))
        np.testing.assert_array_equal(parameter.array, other.first.W.array)
        np.testing.assert_array_equal(parameter.master, other.first.W.array.astype(np.float32))

    def test_a_loaded_file(self, rng, tmp_path):
        with dtype("mixed16"):
            other = Net()
        chainer.serializers.save_npz(tmp_path / "plain.npz", other)
        parameter, _ = self.changed(
            rng, lambda target: chainer.serializers.load_npz(tmp_path / "plain.npz", target.model)
        )
        np.testing.assert_array_equal(parameter.master, other.first.W.array.astype(np.float32))


class Deep(chainer.Chain):
    """Layers of equal size, so that all gradients together are many times the largest one."""

    layers, size = 16, 64

    def __init__(self):
        super().__init__()
        with self.init_scope():
            for index in range(self.layers):
                setattr(self, f"layer{index}", L.Linear(self.size, self.size))

    def forward(self, x):
        for index in range(self.layers):
            x = getattr(self, f"layer{index}")(x)
        return x


class TestFloat32Gradients:
    """They are made one parameter at a time, as far as nobody looks at them."""

    largest = 4 * Deep.size**2

    def ready(self, rng, precision, make, *hooks, **settings):
        """An optimizer whose masters and state exist, and gradients for its next step."""
        with dtype(precision):
            model = AdaLossScaled(Deep(), **settings)
            optimizer = prepared(model, make(), *hooks)
            x = rng.standard_normal((2, Deep.size)).astype(chainer.get_dtype())
            optimizer.update(lambda: F.sum(model(x)))
            model.cleargrads()
            F.sum(model(x)).backward()
        return optimizer

    def peak_of_update(self, optimizer):
        """How many bytes an update takes at most besides what was there before."""
        gc.collect()
        tracemalloc.start()
        try:
            optimizer.update()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("precision", ["mixed16", "float32"])
    @pytest.mark.parametrize("make", [optimizers.SGD, optimizers.MomentumSGD, optimizers.Adam])
    def test_an_update_takes_the_memory_of_a_few_of_them(self, rng, precision, make):
        optimizer = self.ready(rng, precision, make)
        assert self.peak_of_update(optimizer) < 6 * self.largest < Deep.layers * self.largest / 2

    def test_an_update_with_gradients_that_were_scaled_down_takes_no_more(self, rng):
        optimizer = self.ready(rng, "float32", optimizers.SGD, init_scale=2.0**-30)
        assert self.peak_of_update(optimizer) < 6 * self.largest

    def test_an_update_without_gradients_takes_no_more(self, rng):
        optimizer = self.ready(rng, "mixed16", optimizers.SGD)
        optimizer.target.cleargrads()
        assert self.peak_of_update(optimizer) < 6 * self.largest

    def test_a_hook_before_the_update_that_looks_at_them_makes_all(self, rng):
        optimizer = self.ready(rng, "mixed16", optimizers.SGD, hooks.GradientClipping(1.0))
        assert self.peak_of_update(optimizer) > Deep.layers * self.largest

    def test_at_the_end_none_is_left(self, rng):
        optimizer = self.ready(rng, "mixed16", optimizers.SGD, hooks.WeightDecay(0.1))
        optimizer.update()
        for parameter in optimizer.target.params():
            assert [array.dtype for array in parameter.arrays()] == [np.float16]

    def test_an_optimizer_that_makes_no_zeros_for_missing_ones_still_makes_none(self, rng):
        class Sparse(optimizers.MomentumSGD):
            def reallocate_cleared_grads(self):
                pass

        with dtype("mixed16"):
            target = training()
            with target.init_scope():
                target.spare = L.Linear(2, 2)
            seen = []
            optimizer = prepared(target, Sparse())
            target.spare.W.update_rule.add_hook(lambda rule, p: seen.append(p.grad), "look")
            optimizer.update(target, *batch(rng))
        assert seen == [None]

    def test_rules_with_hooks_see_what_the_first_of_two_updates_left(self, rng):
        target, plain = AdaLossScaled(twice()), twice()
        x, _ = batch(rng)
        optimizer, reference = prepared(target, optimizers.SGD(0.05)), optimizers.SGD(0.05).setup(plain)
        for layer in (target[0], plain[0]):
            layer.W.update_rule.add_hook(hooks.WeightDecay(0.1))
        for _ in range(2):
            optimizer.update(lambda: F.sum(target(x) ** 2))
            reference.update(lambda: F.sum(plain(x) ** 2))
        assert_same_bits(values(target), values(plain))
