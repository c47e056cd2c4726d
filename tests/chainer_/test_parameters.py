"""Gradients that parameters hold: kept scaled, read as true, whichever way they came."""

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.gradient import ScaledGradient
from ada_loss.chainer.parameters import ScaledParameter, adopt
from helpers import assert_same_bits, dtype
from toy import SIZE, Net, a_parameter, batch, masters, prepared, training, values


@pytest.fixture
def rng():
    return np.random.default_rng(30)


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, SIZE)).astype(np.float32)


def pair():
    """The same model in float32, wrapped and plain."""
    plain = Net(None)
    plain(np.zeros((2, SIZE), np.float32))
    model = AdaLossScaled(copy.deepcopy(plain), init_scale=32)
    model.cleargrads()
    plain.cleargrads()
    return model, plain


def gradients(plain):
    return {path: None if p.grad is None else p.grad.copy() for path, p in plain.namedparams()}


class TestAccumulation:
    @pytest.mark.parametrize("scales", [(None, None, None), (4.0, 4.0, 4.0), (1.0, 2.0**10, 2.0**-4)])
    def test_over_several_passes_with_equal_or_different_loss_scales(self, x, scales):
        model, plain = pair()
        for factor, scale in enumerate(scales, 1):
            F.sum(F.sin(factor * model(x))).backward(loss_scale=scale)
            F.sum(F.sin(factor * plain(x))).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))

    def test_a_loss_scale_that_is_no_power_of_two_is_divided_out_in_float32(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([3000.0, 6.0, 2.0**-20]), 10), 1000.0)
        expected = np.float32([3000.0, 6.0, 2.0**-20]) / np.float32(1024 * 1000)
        np.testing.assert_allclose(held.grad, expected, rtol=1e-6)

    def test_of_gradients_below_the_range_of_float16(self):
        held = a_parameter()
        for exponent in (30, 40, 35):
            held.receive(ScaledGradient(np.float16([1.0, 2.0, 3.0]), exponent), 1.0)
        expected = np.float32([1, 2, 3]) * np.float32(2.0**-30 + 2.0**-40 + 2.0**-35)
        np.testing.assert_allclose(held.grad, expected, rtol=2e-3)

    def test_of_float16_gradients_is_kept_in_float32(self, rng):
        held = a_parameter()
        passes = [(rng.standard_normal(3).astype(np.float16), int(e)) for e in rng.integers(-3, 9, 300)]
        total = np.zeros(3, np.float32)
        for array, exponent in passes:
            held.receive(ScaledGradient(array, exponent), 2.0**4)
            total = total + np.ldexp(array.astype(np.float32), -exponent - 4)
        np.testing.assert_array_equal(held.grad, total)

    def test_of_a_float16_model_rounds_what_each_pass_brings_and_nothing_else(self, rng):
        with dtype("float16"):
            model = AdaLossScaled(Net())
            batches = [batch(rng)[0] for _ in range(5)]
            parts = []
            for x in batches:
                model.cleargrads()
                F.sum(F.sin(model(x))).backward()
                parts.append(model.true_gradients())
            model.cleargrads()
            for x in batches:
                F.sum(F.sin(model(x))).backward()
        for path, gradient in model.true_gradients().items():
            np.testing.assert_array_equal(gradient, sum(part[path] for part in parts), err_msg=path)

    def test_with_ever_different_loss_scales_holds_one_array(self, rng):
        held, total = a_parameter("float32"), np.zeros(3)
        for _ in range(30):
            array, scale = rng.standard_normal(3).astype(np.float32), rng.uniform(1, 1000)
            held.receive(ScaledGradient(array, 3), scale)
            total += array / (8 * scale)
            assert len(held.arrays()) == 1
        np.testing.assert_allclose(held.grad, total, rtol=1e-4, atol=1e-7)

    def test_modifies_no_array_that_came_in(self):
        held, first, second = a_parameter(), np.float16([1, 2, 3]), np.float16([4, 5, 6])
        held.receive(ScaledGradient(first, 3), 1.0)
        held.receive(ScaledGradient(second, 3), 1.0)
        held.grad *= 2
        assert first.tolist() == [1, 2, 3] and second.tolist() == [4, 5, 6]

    def test_holds_one_array_for_each_kind_of_scale_however_many_passes(self):
        held = a_parameter()
        for step in range(50):
            held.receive(ScaledGradient(np.float16([1, 2, 3]), step % 7), 2.0 ** (step % 5))
        assert len(held.arrays()) == 1

    @pytest.mark.filterwarnings("ignore:.*zerograd.* is deprecated")
    def test_starts_anew_after_cleargrads_and_zerograds(self, x):
        model, plain = pair()
        F.sum(model(x)).backward()
        model.cleargrads()
        assert all(gradient is None for gradient in model.true_gradients().values())
        F.sum(model(x)).backward()
        model.zerograds()
        F.sum(F.sin(model(x))).backward(loss_scale=8)
        F.sum(F.sin(plain(x))).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))


class TestParametersUsedOutsideTheScope:
    @pytest.mark.parametrize("scales", [(None,), (64.0,), (64.0, 2.0**-3)])
    def test_get_the_sum_of_both(self, x, scales):
        model, plain = pair()
        for scale in scales:
            loss = F.sum(F.sin(model(x))) + F.sum(model.first.W**2)
            loss.backward(loss_scale=scale)
            (F.sum(F.sin(plain(x))) + F.sum(plain.first.W**2)).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))

    @pytest.mark.parametrize("scales", [(8.0, 8.0), (8.0, 2.0**-3), (None, 32.0)])
    def test_get_true_gradients_over_passes_outside_only(self, scales):
        model, plain = pair()
        for factor, scale in enumerate(scales, 1):
            F.sum(F.sin(factor * model.first.W)).backward(loss_scale=scale)
            F.sum(F.sin(factor * plain.first.W)).backward()
        np.testing.assert_array_equal(model.first.W.grad, plain.first.W.grad)

    @pytest.mark.parametrize("scale", [None, 64.0])
    def test_get_true_gradients_from_a_scope_inside_forget(self, x, scale):
        model, plain = pair()
        F.sum(F.sin(F.forget(model, x))).backward(loss_scale=scale)
        F.sum(F.sin(plain(x))).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))

    @pytest.mark.parametrize("scale", [None, 64.0])
    def test_get_true_gradients_from_inside_forget(self, x, scale):
        layer, model = L.Linear(SIZE, SIZE), AdaLossScaled(L.Linear(SIZE, 2))
        target = chainer.Sequential(layer, model)
        plain = copy.deepcopy(target)
        optimizer = prepared(target, chainer.optimizers.SGD(0.1))
        target.cleargrads()
        F.sum(F.sin(model(F.forget(layer, chainer.Variable(x))))).backward(loss_scale=scale)
        optimizer.update()
        plain.cleargrads()
        F.sum(F.sin(plain[1](plain[0](x)))).backward()
        np.testing.assert_array_equal(layer.W.array, plain[0].W.array - np.float32(0.1) * plain[0].W.grad)

    def test_with_a_plain_optimizer_behave_as_chainers_own(self, x):
        _, plain = pair()
        ours = copy.deepcopy(plain)
        for parameter in ours.params():
            adopt(parameter)
        for link in (ours, plain):
            optimizer = chainer.optimizers.MomentumSGD(0.1).setup(link)
            optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
            for scale in (None, 16.0):
                link.cleargrads()
                F.sum(F.sin(link(x))).backward(loss_scale=scale)
                if scale is None:
                    optimizer.update()
        assert_same_bits(values(ours), values(plain))


class TestReadingAndWriting:
    def test_an_update_of_a_single_parameter_by_its_rule_is_refused_too(self, x):
        model, _ = pair()
        chainer.optimizers.SGD().setup(model)
        F.sum(model(x)).backward()
        with pytest.raises(RuntimeError, match="prepare"):
            model.first.W.update()

    def test_grad_reads_as_the_true_gradient_in_float32(self, rng):
        with dtype("mixed16"):
            target = training()
            target.cleargrads()
            target(*batch(rng)).backward(loss_scale=2.0**10)
            for path, gradient in target.model.true_gradients().items():
                read = dict(target.model.namedparams())[path].grad
                assert read.dtype == np.float32
                np.testing.assert_array_equal(read, gradient)

    def test_what_was_read_is_the_gradient_from_then_on(self, x):
        model, plain = pair()
        F.sum(model(x)).backward(loss_scale=8)
        F.sum(plain(x)).backward()
        for link in (model, plain):
            for held in link.params():
                held.grad *= 0.5
                np.clip(held.grad, -0.1, 0.1, out=held.grad)
        F.sum(F.sin(model(x))).backward(loss_scale=16)
        F.sum(F.sin(plain(x))).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))

    def test_an_assigned_gradient_replaces_the_one_in_flight(self, x):
        model, plain = pair()
        for link in (model, plain):
            F.sum(link(x)).backward()
            link.first.W.grad = np.full_like(link.first.W.array, 2)
            F.sum(F.sin(link(x))).backward()
        assert_same_bits(model.true_gradients(), gradients(plain))

    def test_none_may_be_assigned(self, x):
        model, _ = pair()
        F.sum(model(x)).backward()
        model.first.W.grad = None
        assert model.true_gradients()["/first/W"] is None

    def test_a_gradient_of_another_shape_may_not(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 3), 1.0)
        with pytest.raises(ValueError, match="shape"):
            held.grad = np.zeros(4, np.float32)
        with pytest.raises((TypeError, ValueError)):
            held.grad = np.zeros(3, np.int64)

    def test_grad_var_reads_as_the_true_gradient_too(self):
        held = a_parameter()
        held.receive(ScaledGradient(np.float16([1, 2, 3]), 30), 2.0)
        np.testing.assert_array_equal(held.grad_var.array, np.float32([1, 2, 3]) * np.float32(2.0**-31))

    def test_parameters_never_share_the_array_that_they_show(self):
        class Sum(chainer.Chain):
            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.a, self.b = chainer.Parameter(0, (3,)), chainer.Parameter(0, (3,))

            def forward(self):
                return self.a + self.b

        model = AdaLossScaled(Sum())
        model.cleargrads()
        F.sum(model()).backward()
        model.a.grad *= 3
        assert model.b.grad.tolist() == [1, 1, 1]


class TestParallelReplicas:
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("precision", ["float32", "mixed16"])
    def test_parallel_updater_trains_as_one_model_does_on_the_whole_batch(self, precision):
        results = []
        for updater_class, options in (
            (chainer.training.StandardUpdater, {}),
            (chainer.training.ParallelUpdater, {"devices": {"main": "@numpy", "second": "@numpy"}}),
        ):
            with dtype(precision):
                x, t = batch(np.random.default_rng(31), 12)
                t[8] = np.inf
                target = training(precision, norm=lambda channels: chainer.Sequential(F.identity))
                data = chainer.datasets.TupleDataset(x, t)
                iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
                optimizer = prepared(target)
                updater = updater_class(iterator, optimizer, loss_scale=8, **options)
                # The replicas' gradients are added, so their losses count half.
                weight = 1 / len(options.get("devices", "1"))
                for model in getattr(updater, "_models", {"main": target}).values():
                    model.weight = weight
                for _ in range(3):
                    updater.update()
            for model in getattr(updater, "_models", {"main": target}).values():
                assert model.model.ada_loss.policy.entry == optimizer.entry_scale
                assert_same_bits(values(model), values(target))
            assert optimizer.entry_scale.skipped == 1
            results.append(masters(target))
        for path, master in results[0].items():
            np.testing.assert_allclose(results[1][path], master, rtol=1e-3, atol=1e-3, err_msg=path)

    @pytest.mark.parametrize("precision", ["float32", "mixed16"])
    def test_addgrads_adds_true_gradients(self, rng, precision):
        with dtype(precision):
            model = training(precision).model
            replica = model.copy("copy")
            total = {}
            for link, scale in ((model, 2.0**10), (replica, 4.0)):
                x, _ = batch(rng)
                link.cleargrads()
                F.sum(F.sin(link(x))).backward(loss_scale=scale)
                for path, gradient in link.true_gradients().items():
                    total[path] = total[path] + gradient if path in total else gradient
            model.addgrads(replica)
        assert_same_bits(model.true_gradients(), total)

    def test_addgrads_of_a_replica_alone_still_needs_a_prepared_optimizer(self, x):
        model, _ = pair()
        replica = model.copy("copy")
        F.sum(replica(x)).backward()
        model.addgrads(replica)
        with pytest.raises(RuntimeError, match="prepare"):
            chainer.optimizers.SGD().setup(model).update()

    def test_a_shared_copy_has_a_gradient_of_its_own(self, x):
        model, _ = pair()
        other = model.copy("share")
        F.sum(other(x)).backward()
        assert model.first.W.array is other.first.W.array
        assert model.first.W.grad is None and other.first.W.grad is not None

    def test_a_copy_to_be_initialized_anew_trains(self, rng):
        model = AdaLossScaled(Net()).copy("init")
        optimizer = prepared(model)
        x, _ = batch(rng)
        optimizer.update(lambda: F.sum(model(x) ** 2))
        assert optimizer.t == 1


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("precision", ["float32", "mixed16"])
    def test_keep_gradients_masters_and_scales(self, rng, duplicate, precision):
        with dtype(precision):
            target = training(precision, update_per_n_iteration=3)
            optimizer = prepared(target)
            for magnitude in (1, np.nan, 1):
                optimizer.update(target, *batch(rng, magnitude=magnitude))
            target.cleargrads()
            target(*batch(rng)).backward(loss_scale=64)
            other = duplicate(target)
        assert_same_bits(other.model.true_gradients(), target.model.true_gradients())
        for (path, mine), (_, theirs) in zip(target.namedparams(), other.namedparams(), strict=True):
            assert isinstance(theirs, ScaledParameter), path
            assert (mine.master is None) == (theirs.master is None)
            if mine.master is not None:
                np.testing.assert_array_equal(mine.master, theirs.master)
                assert mine.master is not theirs.master
        assert other.model.ada_loss.policy.to_json() == target.model.ada_loss.policy.to_json()

    def test_train_on_like_the_original(self, rng):
        with dtype("mixed16"):
            target = training()
            data = [batch(rng) for _ in range(3)]
            prepared(target).update(target, *data[0])
            results = []
            for copied in (target, copy.deepcopy(target)):
                optimizer = prepared(copied)
                for each in data[1:]:
                    optimizer.update(copied, *each)
                results.append(values(copied))
        assert_same_bits(*results)

    def test_with_a_gradient_still_need_a_prepared_optimizer(self, x):
        model, _ = pair()
        F.sum(model(x)).backward()
        other = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="prepare"):
            chainer.optimizers.SGD().setup(other).update()


class TestAdoption:
    def test_keeps_the_object_its_name_array_and_rule(self):
        plain = chainer.Parameter(1.0, (2,), name="weight")
        plain.update_rule = chainer.optimizers.SGD().create_update_rule()
        array, rule = plain.array, plain.update_rule
        assert adopt(plain) is plain
        assert plain.array is array and plain.update_rule is rule and plain.name == "weight"

    def test_keeps_a_gradient_and_divides_its_loss_scale_out(self):
        plain = chainer.Parameter(np.ones(2, np.float32))
        plain.cleargrad()
        F.sum(3 * plain).backward(loss_scale=8)
        assert adopt(plain).grad.tolist() == [3, 3]

    def test_keeps_a_class_that_somebody_derived(self):
        class Positive(chainer.Parameter):
            def update(self):
                super().update()
                self.array = abs(self.array)

        target = AdaLossScaled(L.Linear(2, 2))
        with target.init_scope():
            target.gain = Positive(np.float32([0.5, 0.25]))
        optimizer = prepared(target, chainer.optimizers.SGD(1.0))
        optimizer.update(lambda: F.sum(target(np.ones((1, 2), np.float32)) * target.gain))
        assert isinstance(target.gain, Positive) and (target.gain.array > 0).all()

    def test_of_an_uninitialized_parameter_keeps_it_uninitialized(self):
        lazy = adopt(chainer.Parameter(chainer.initializers.One(np.float16)))
        assert lazy.array is None and lazy.dtype == np.float16
        lazy.cleargrad()
        lazy.initialize((2,))
        assert lazy.grad is None and lazy.array.tolist() == [1, 1]
