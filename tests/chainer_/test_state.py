"""Snapshots: they hold all that decides the next step, so a resumed training is the uninterrupted one."""

import io
from dataclasses import fields, replace

import chainer
import numpy as np
import pytest
from chainer import optimizers, serializers
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_loss.chainer import AdaLossScaled
from ada_loss.core.config import METHODS, TIMINGS
from ada_loss.core.decision import Decision, Site
from ada_loss.core.entry_scale import EntryScale
from ada_loss.core.range import Range
from ada_loss.core.rules import RULES
from helpers import assert_same_bits, dtype
from toy import SIZE, Net, Training, batch, masters, prepared, training, values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIMIZERS = {"MomentumSGD": lambda: optimizers.MomentumSGD(0.05), "Adam": lambda: optimizers.Adam(0.01)}

RESUMABLE = [
    getattr(optimizers, name)
    for name in dir(optimizers)
    if isinstance(getattr(optimizers, name), type)
    and issubclass(getattr(optimizers, name), chainer.Optimizer)
]


@pytest.fixture
def rng():
    return np.random.default_rng(40)


def in_memory(*objects):
    """What a snapshot of several objects holds."""
    saved = []
    for each in objects:
        file = io.BytesIO()
        serializers.save_npz(file, each)
        saved.append(file)
    return saved


def restore(saved, *objects):
    for file, each in zip(saved, objects, strict=True):
        file.seek(0)
        serializers.load_npz(file, each)


def everything(optimizer, target):
    """All that a step may change."""
    states = {
        f"{path} {key}": np.copy(value)
        for path, p in target.namedparams()
        for key, value in (p.update_rule.state or {}).items()
    }
    rounded = {f"{path} as the model sees it": array for path, array in values(target).items()}
    numbers = {
        f"{path} {key}": np.array(value)
        for path, p in target.namedparams()
        for key, value in vars(p.update_rule).items()
        if isinstance(value, int | float)
    }
    scale = (
        [optimizer._loss_scale, optimizer._loss_scaling_isnan_ever]
        if optimizer._loss_scaling_is_dynamic
        else []
    )
    state = {
        "policy": np.array(target.model.ada_loss.policy.to_json()),
        "t": np.array([optimizer.t, optimizer.epoch]),
    }
    return {
        **rounded,
        **masters(target),
        **states,
        **numbers,
        **state,
        "Chainer's loss scale": np.array(scale),
    }


class Trainer:
    """A training with Chainer's own loop, iterator and snapshots, whose data make some steps overflow."""

    def __init__(self, out, make_target, make_optimizer, configure=lambda optimizer: None):
        rng = np.random.default_rng(41)
        x, t = batch(rng, 24)
        t[7] = np.inf
        self.target = make_target()
        self.optimizer = prepared(self.target, make_optimizer(), chainer.optimizer_hooks.WeightDecay(1e-3))
        configure(self.optimizer)
        iterator = chainer.iterators.SerialIterator(
            chainer.datasets.TupleDataset(x, t),
            4,
            order_sampler=lambda order, position: np.roll(range(24), 5),
        )
        updater = chainer.training.StandardUpdater(iterator, self.optimizer)
        self.trainer = chainer.training.Trainer(updater, (18, "iteration"), str(out))
        self.trainer.extend(
            chainer.training.extensions.snapshot(filename="at_{.updater.iteration}"), trigger=(7, "iteration")
        )

    def run(self):
        self.trainer.run()
        assert 0 < self.optimizer.entry_scale.skipped < 6
        return everything(self.optimizer, self.target)


def assert_resumes(tmp_path, *make):
    with dtype("mixed16"):
        whole = Trainer(tmp_path / "whole", *make).run()
        for iteration in (7, 14):
            resumed = Trainer(tmp_path / "resumed", *make)
            serializers.load_npz(tmp_path / "whole" / f"at_{iteration}", resumed.trainer)
            assert_same_bits(resumed.run(), whole)


class TestAResumedTrainingIsTheUninterruptedOne:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_for_every_method(self, tmp_path, method, optimizer):
        assert_resumes(tmp_path, lambda: training(method=method, init_scale=4), OPTIMIZERS[optimizer])

    @pytest.mark.parametrize("method", ["fixed", "approx_range"])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_for_a_dynamic_scale_and_shifts_that_are_kept_for_three_iterations(
        self, tmp_path, method, optimizer
    ):
        settings = dict(dynamic_interval=2, update_per_n_iteration=3)
        assert_resumes(tmp_path, lambda: training(method=method, **settings), OPTIMIZERS[optimizer])

    def test_where_chainers_own_loss_scale_is_dynamic(self, tmp_path):
        def configure(optimizer):
            optimizer.loss_scaling(interval=3)

        assert_resumes(tmp_path, training, OPTIMIZERS["Adam"], configure)

    def test_where_layers_get_their_shapes_from_the_first_batch(self, tmp_path):
        def lazy():
            np.random.seed(3)
            return Training(AdaLossScaled(Net(None)))

        assert_resumes(tmp_path, lazy, OPTIMIZERS["Adam"])

    @settings(max_examples=25, deadline=None)
    @given(
        method=st.sampled_from(METHODS),
        timing=st.sampled_from(TIMINGS),
        interval=st.sampled_from([None, 1, 2]),
        every=st.integers(1, 4),
        optimizer_class=st.sampled_from(RESUMABLE),
        chainers_interval=st.sampled_from([None, 1, 2]),
        magnitudes=st.lists(st.sampled_from([1e-4, 1.0, 1e3, np.inf]), min_size=2, max_size=8),
        data=st.data(),
    )
    def test_wherever_it_was_interrupted(
        self, method, timing, interval, every, optimizer_class, chainers_interval, magnitudes, data
    ):
        def start():
            target = training(
                method=method, timing=timing, dynamic_interval=interval, update_per_n_iteration=every
            )
            optimizer = prepared(target, optimizer_class())
            if chainers_interval is not None:
                optimizer.loss_scaling(interval=chainers_interval)
            return optimizer, target

        at = data.draw(st.integers(0, len(magnitudes)), label="interrupted at")
        with dtype("mixed16"):
            rng = np.random.default_rng(42)
            batches = [batch(rng, magnitude=magnitude) for magnitude in magnitudes]
            optimizer, target = start()
            for each in batches[:at]:
                optimizer.update(target, *each)
            saved, then = in_memory(optimizer, target), everything(optimizer, target)
            for each in batches[at:]:
                optimizer.update(target, *each)
            whole, (optimizer, target) = everything(optimizer, target), start()
            restore(saved, optimizer, target)
            if at:
                assert_same_bits(everything(optimizer, target), then)
            for each in batches[at:]:
                optimizer.update(target, *each)
            assert_same_bits(everything(optimizer, target), whole)


COUNTS, EXPONENTS = st.integers(0, 2**40), st.integers(-200, 200)
RANGES = st.builds(Range, EXPONENTS, EXPONENTS, EXPONENTS, st.floats(0, 1), st.booleans(), st.booleans())
DECISIONS = st.builds(
    Decision,
    st.builds(Site, st.text(), COUNTS, COUNTS),
    st.sampled_from([*RULES.values()]),
    EXPONENTS,
    EXPONENTS,
    RANGES,
)
ENTRY = {
    field.name: EXPONENTS
    for field in fields(EntryScale)
    if field.name not in ("initial", "interval", "number_format")
}

SETTINGS = {"config", "layers", "number_format"}
NOT_SAVED = SETTINGS | {"fan_outs", "_deferred", "_deferred_amaxes", "_weights", "_calls", "_met"}
"""What of a policy comes from the script that resumes, is found anew, or belongs to an unfinished step."""


class TestEveryField:
    @settings(max_examples=60, deadline=None)
    @given(
        method=st.sampled_from(METHODS),
        init_scale=st.sampled_from([2.0**-7, 1.0, 64.0]),
        iteration=COUNTS,
        entry=st.fixed_dictionaries(ENTRY),
        decisions=st.lists(DECISIONS, max_size=4),
    )
    def test_of_a_policy_comes_back(self, method, init_scale, iteration, entry, decisions):
        model, other = (AdaLossScaled(Net(), method, init_scale=init_scale) for _ in range(2))
        policy = model.ada_loss.policy
        policy.iteration, policy.entry = iteration, replace(policy.entry, **entry)
        policy.decisions = {decision.site: decision for decision in decisions}
        restore(in_memory(model), other)
        assert vars(other.ada_loss.policy).keys() == vars(policy).keys() >= NOT_SAVED
        for name in vars(policy).keys() - NOT_SAVED:
            assert getattr(other.ada_loss.policy, name) == getattr(policy, name), name

    @settings(max_examples=20, deadline=None)
    @given(
        scale=st.floats(1, 2.0**30),
        ever=st.booleans(),
        steps=COUNTS,
        seed=st.integers(0, 2**32 - 1),
        optimizer_class=st.sampled_from(RESUMABLE),
    )
    def test_of_a_prepared_optimizer_comes_back(self, scale, ever, steps, seed, optimizer_class):
        rng = np.random.default_rng(seed)
        with dtype("mixed16"):
            pairs = []
            for _ in range(2):
                target = training()
                pairs.append((prepared(target, optimizer_class()), target))
                pairs[-1][0].loss_scaling()
                for parameter in target.params():
                    parameter.update_rule.average = 0.0
            (optimizer, target), other = pairs
            in_memory(optimizer)  # Now every rule has its state.
            optimizer.t, optimizer.epoch, optimizer._loss_scale = steps, steps // 7, scale
            optimizer._loss_scaling_isnan_ever = ever
            for parameter in target.params():
                rule = parameter.update_rule
                rule.t = int(rng.integers(1000))
                rule.average = rng.uniform()
                for key, value in rule.state.items():
                    rule.state[key] = rng.standard_normal(np.shape(value)).astype(np.asarray(value).dtype)
                if parameter.dtype == np.float16:
                    parameter.master = rng.standard_normal(parameter.shape).astype(np.float32)
            restore(in_memory(optimizer, target), *other)
        assert_same_bits(everything(*other), everything(optimizer, target))


class TestFiles:
    def trained(self, rng, **settings):
        target = training(**settings)
        optimizer = prepared(target)
        for magnitude in (1, np.inf, 1):
            optimizer.update(target, *batch(rng, magnitude=magnitude))
        return optimizer, target

    def test_of_the_plain_model_load_and_start_afresh(self, rng, tmp_path):
        with dtype("mixed16"):
            optimizer, target = self.trained(rng)
            fresh = training()
            plain = Net()
            serializers.save_npz(tmp_path / "plain.npz", plain)
            serializers.load_npz(tmp_path / "plain.npz", target.model)
        assert target.model.ada_loss.policy.to_json() == fresh.model.ada_loss.policy.to_json()
        np.testing.assert_array_equal(target.model.first.W.array, plain.first.W.array)

    def test_of_the_wrapped_model_load_into_the_plain_one(self, rng, tmp_path):
        with dtype("mixed16"):
            _, target = self.trained(rng)
            serializers.save_npz(tmp_path / "scaled.npz", target.model)
            plain = Net()
            serializers.load_npz(tmp_path / "scaled.npz", plain)
        np.testing.assert_array_equal(plain.first.W.array, target.model.first.W.array)

    def test_of_an_optimizer_that_was_not_prepared_load(self, rng, tmp_path):
        with dtype("mixed16"):
            plain = optimizers.MomentumSGD().setup(Net())
            plain.use_fp32_update()
            x, _ = batch(rng)
            plain.update(lambda: chainer.functions.sum(plain.target(x) ** 2))
            serializers.save_npz(tmp_path / "plain.npz", plain)
            model = AdaLossScaled(Net())
            optimizer = prepared(model)
            serializers.load_npz(tmp_path / "plain.npz", optimizer)
        assert optimizer.t == 1 and model.first.W.master is None
        np.testing.assert_array_equal(
            model.first.W.update_rule.state["v"], plain.target.first.W.update_rule.state["v"]
        )

    def test_of_a_training_that_has_not_made_a_step_load(self, tmp_path):
        with dtype("mixed16"):
            target = training()
            serializers.save_npz(tmp_path / "first.npz", prepared(target, optimizers.Adam()))
            other = prepared(training(), optimizers.Adam())
            serializers.load_npz(tmp_path / "first.npz", other)
        assert other.t == 0

    def test_load_into_a_model_that_has_been_trained_already(self, rng, tmp_path):
        with dtype("mixed16"):
            saved = in_memory(*self.trained(rng))
            expected = everything(*self.restored(saved, prepared(target := training()), target))
            assert_same_bits(everything(*self.restored(saved, *self.trained(rng, method="auto"))), expected)

    def restored(self, saved, optimizer, target):
        restore(saved, optimizer, target)
        return optimizer, target

    def test_hold_masters_in_float32_beside_the_float16_parameters(self, rng, tmp_path):
        with dtype("mixed16"):
            optimizer, target = self.trained(rng)
        (file, _) = in_memory(optimizer, target)
        file.seek(0)
        with np.load(file) as saved:
            master = saved["ada_loss/master/model/first/W"]
            assert master.dtype == np.float32 and master.shape == (8, SIZE)
            assert "ada_loss/master/model/norm/gamma" not in saved

    def test_without_strictness_load_from_what_is_there(self, rng, tmp_path):
        with dtype("mixed16"):
            optimizer, target = self.trained(rng)
            serializers.save_npz(tmp_path / "plain.npz", Net())
            serializers.load_npz(tmp_path / "plain.npz", target.model, strict=False)
            serializers.load_npz(tmp_path / "plain.npz", optimizer, strict=False)
        assert target.model.ada_loss.policy.iteration == 0 and target.model.first.W.master is None

    def test_in_hdf5_hold_the_same(self, rng, tmp_path):
        pytest.importorskip("h5py", reason="h5py is not installed")
        with dtype("mixed16"):
            optimizer, target = self.trained(rng, update_per_n_iteration=3)
            serializers.save_hdf5(tmp_path / "model.h5", target)
            serializers.save_hdf5(tmp_path / "optimizer.h5", optimizer)
            other = training(update_per_n_iteration=3)
            loaded = prepared(other)
            serializers.load_hdf5(tmp_path / "optimizer.h5", loaded)
            serializers.load_hdf5(tmp_path / "model.h5", other)
            assert_same_bits(everything(loaded, other), everything(optimizer, target))
            serializers.save_hdf5(tmp_path / "plain.h5", Net())
            serializers.load_hdf5(tmp_path / "plain.h5", other.model)
        assert other.model.ada_loss.policy.iteration == 0
