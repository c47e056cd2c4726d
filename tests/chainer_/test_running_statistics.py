"""A skipped step leaves no trace in what links keep, such as running statistics: not one bit."""

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizers
from chainer.training import StandardUpdater
from chainer.training.updaters import ParallelUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_loss.chainer import AdaLossScaled, prepare
from helpers import assert_same_bits, dtype
from toy import prepared, values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CHANNELS = 4


class Mean(chainer.Link):
    """A user's own running mean: a new array in each call, and a counter."""

    def __init__(self, size):
        super().__init__()
        self.add_persistent("mean", np.zeros(size, np.float32))
        self.add_persistent("calls", 0)

    def forward(self, x):
        if chainer.config.train and not chainer.config.in_recomputing:
            self.mean = 0.9 * self.mean + 0.1 * x.array.mean(0, dtype=np.float32)
            self.calls += 1
        return x - self.mean.astype(x.dtype)


class Memory(Mean):
    """One that is written in place."""

    def forward(self, x):
        self.mean[:] = x.array.mean(0)
        return 2 * x


def spectral(size):
    return L.Linear(size, size).add_hook(link_hooks.SpectralNormalization())


LINKS = {
    "BatchNormalization": L.BatchNormalization,
    "of the first batch's shape": lambda size: L.BatchNormalization(axis=0),
    "with initial statistics": lambda size: L.BatchNormalization(
        axis=0, initial_avg_mean=3, initial_avg_var=2
    ),
    "BatchRenormalization": L.BatchRenormalization,
    "DecorrelatedBatchNormalization": lambda size: L.DecorrelatedBatchNormalization(size, groups=2),
    "a link that replaces its array": Mean,
    "a link that writes into its array": Memory,
    "SpectralNormalization": spectral,
}


class Net(chainer.Chain):
    def __init__(self, make):
        super().__init__()
        with self.init_scope():
            self.a, self.norm, self.b = L.Linear(CHANNELS, CHANNELS), make(CHANNELS), L.Linear(CHANNELS, 2)

    def forward(self, x):
        return self.b(F.tanh(self.norm(self.a(x))))


def kept(link):
    """Copies of all persistent values, by path."""
    return {
        f"{path}/{name}": copy.deepcopy(getattr(each, name))
        for path, each in link.namedlinks()
        for name in each._persistent
    }


def data(rng, magnitude=1.0):
    x = rng.standard_normal((6, CHANNELS)) * magnitude
    return x.astype(chainer.get_dtype())


def bad(rng):
    return data(rng, np.nan)


def loss_of(model, x):
    return F.mean(F.cast(model(x), "float32") ** 2)


def by_hand(optimizer, model, *batches):
    model.cleargrads()
    for x in batches:
        loss_of(model, x).backward()
    optimizer.update()


def cleared_in_between(optimizer, model, *batches):
    losses = [loss_of(model, x) for x in batches]
    model.cleargrads()
    for loss in losses:
        loss.backward()
    optimizer.update()


def with_a_loss_function(optimizer, model, *batches):
    optimizer.update(lambda: sum(loss_of(model, x) for x in batches))


def with_forgetting(optimizer, model, *batches):
    model.cleargrads()
    for x in batches:
        F.forget(lambda h: loss_of(model, h), chainer.Variable(x)).backward()
    optimizer.update()


def with_an_evaluation_in_between(optimizer, model, *batches):
    model.cleargrads()
    for x in batches:
        loss = loss_of(model, x)
        with chainer.no_backprop_mode(), chainer.using_config("train", False):
            model(batches[0])
        loss.backward()
    optimizer.update()


STEPS = [by_hand, cleared_in_between, with_a_loss_function, with_forgetting, with_an_evaluation_in_between]


def started(make, kind="mixed16"):
    with dtype(kind):
        target = chainer.Chain(model=AdaLossScaled(Net(make)))
    return target.model, prepared(target, optimizers.Adam())


@pytest.fixture
def rng():
    np.random.seed(3)
    return np.random.default_rng(27)


def assert_put_back(optimizer, model, step, *batches):
    before, skipped = kept(model), optimizer.entry_scale.skipped
    step(optimizer, model, *batches)
    assert optimizer.entry_scale.skipped == skipped + 1
    assert_same_bits(kept(model), before)


@pytest.mark.parametrize("kind", ["mixed16", "float32"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LINKS)
def test_of_any_link_in_any_loop(rng, name, step, kind):
    if name == "DecorrelatedBatchNormalization" and kind == "mixed16":
        pytest.skip("NumPy's linear algebra takes no float16")
    with dtype(kind):
        model, optimizer = started(LINKS[name], kind)
        step(optimizer, model, data(rng))
        assert_put_back(optimizer, model, step, bad(rng))
        assert_put_back(optimizer, model, step, data(rng), bad(rng))
        assert_put_back(optimizer, model, step, bad(rng), data(rng), data(rng))
        before = kept(model)
        step(optimizer, model, data(rng))
        after = kept(model)
        assert any(not np.array_equal(after[path], before[path]) for path in before)


@pytest.mark.parametrize("step", [by_hand, with_a_loss_function])
def test_that_get_their_shape_in_the_very_step_that_is_skipped(rng, step):
    make = LINKS["with initial statistics"]
    with dtype("mixed16"):
        model, optimizer = started(make)
        step(optimizer, model, bad(rng))
        assert optimizer.entry_scale.skipped == 1
        np.testing.assert_array_equal(model.norm.avg_mean, np.full(CHANNELS, 3, np.float32))
        np.testing.assert_array_equal(model.norm.avg_var, np.full(CHANNELS, 2, np.float32))
        step(optimizer, model, data(rng))
        assert optimizer.t == 1 and np.isfinite(model.norm.avg_mean).all()


@pytest.mark.parametrize("with_function", [True, False])
def test_of_copies_that_share_their_arrays(rng, with_function):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        other = model.copy("share")
        assert other.norm.avg_mean is model.norm.avg_mean

        def step(x):
            def loss():
                return loss_of(model, x) + loss_of(other, x) + loss_of(model, x)

            if with_function:
                optimizer.update(loss)
            else:
                model.cleargrads()
                loss().backward()
                optimizer.update()

        step(data(rng))
        before = kept(model)
        step(bad(rng))
        assert optimizer.entry_scale.skipped == 1
        assert_same_bits(kept(model), before)


def test_a_loss_function_that_raises_ends_its_step(rng):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)

        def loss():
            loss_of(model, data(rng))
            raise KeyError("no more data")

        with pytest.raises(KeyError):
            optimizer.update(loss)
        assert_put_back(optimizer, model, with_a_loss_function, bad(rng))
        assert_put_back(optimizer, model, by_hand, bad(rng))


def test_what_was_written_outside_the_step_stays(rng):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        by_hand(optimizer, model, data(rng))
        with chainer.no_backprop_mode():
            model(data(rng))
        model(data(rng))
        model.norm.avg_var[:] = 5
        loss_of(model, data(rng))
        assert_put_back(optimizer, model, by_hand, bad(rng))
        model.norm.avg_var[:] = 7
        assert_put_back(optimizer, model, with_a_loss_function, bad(rng))


def test_a_bad_batch_that_no_gradient_came_back_through_leaves_nothing_either(rng):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        by_hand(optimizer, model, data(rng))
        before = kept(model)
        x = bad(rng)
        loss_of(model, x)
        by_hand(optimizer, model, x)
        assert_same_bits(kept(model), before)


def test_an_update_that_looks_at_nothing_but_gradients_at_hand(rng):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        before = kept(model)
        model.cleargrads()
        loss_of(model, data(rng)).backward()
        model.b.b.grad[0] = np.inf
        optimizer.update()
        assert_same_bits(kept(model), before)


def test_a_step_goes_back_no_further_than_the_last_update(rng):
    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        other, second = started(L.BatchNormalization)
        loss = loss_of(model, data(rng))
        before = kept(model)
        by_hand(second, other, data(rng))
        model.cleargrads()
        (loss * np.float32(np.inf)).backward()
        optimizer.update()
        assert optimizer.entry_scale.skipped == 1
        assert_same_bits(kept(model), before)


def test_of_links_outside_the_scaled_model(rng):
    with dtype("mixed16"):
        target = chainer.Sequential(
            L.BatchNormalization(CHANNELS), AdaLossScaled(Net(L.BatchNormalization)), L.BatchNormalization(2)
        )
        optimizer = prepared(target)
        for step in STEPS:
            step(optimizer, target, data(rng))
            assert_put_back(optimizer, target, step, bad(rng))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("with_function", [True, False])
def test_in_an_adversarial_training(rng, detach, with_function):
    """The generator's statistics are written in the critic's step as well."""
    with dtype("mixed16"):
        generator, critic = (AdaLossScaled(Net(L.BatchNormalization), output_dtype=None) for _ in range(2))
        del critic.b
        with critic.init_scope():
            critic.b = L.Linear(CHANNELS, CHANNELS)
        optimizer = prepared(critic)
        prepared(generator)

        def loss(x):
            fake = F.pad(generator(x), ((0, 0), (0, 2)), "constant")
            if detach:
                fake.unchain_backward()
            return F.sum(F.cast(critic(fake), "float32"))

        def step(x):
            if with_function:
                optimizer.update(loss, x)
                return
            critic.cleargrads()
            loss(x).backward()
            optimizer.update()

        step(data(rng))
        before = kept(generator) | {f"critic{path}": value for path, value in kept(critic).items()}
        step(bad(rng))
        after = kept(generator) | {f"critic{path}": value for path, value in kept(critic).items()}
        assert optimizer.entry_scale.skipped == 1
        assert_same_bits(after, before)


@pytest.mark.parametrize("parallel", [False, True])
def test_with_chainers_updaters(rng, parallel):
    turns = []

    def loss(x):
        # A parallel updater calls a loss function without saying which of its replicas is meant.
        turns.append(x)
        replicas = list(updater._models.values()) if parallel else [optimizer.target]
        return loss_of(replicas[len(turns) % len(replicas)].model, x)

    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        batches = [data(rng), bad(rng), data(rng)]
        iterator = chainer.iterators.SerialIterator(np.concatenate(batches), 6, shuffle=False)
        if parallel:
            devices = {"main": "@numpy", "second": "@numpy"}
            updater = ParallelUpdater(iterator, optimizer, devices=devices, loss_func=loss)
        else:
            updater = StandardUpdater(iterator, optimizer, loss_func=loss)
        updater.update()
        before = kept(model)
        updater.update()
        assert optimizer.entry_scale.skipped == 1
        assert_same_bits(kept(model), before)
        updater.update()
        assert optimizer.t == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize(
    "name", ["BatchNormalization", "BatchRenormalization", "a link that replaces its array"]
)
def test_of_a_copy_of_optimizer_and_model(rng, name, duplicate):
    with dtype("mixed16"):
        model, optimizer = started(LINKS[name])
        by_hand(optimizer, model, data(rng))
        other = duplicate(optimizer)
        before = kept(model)
        assert_put_back(other, other.target.model, by_hand, bad(rng))
        by_hand(other, other.target.model, data(rng))
        assert_same_bits(kept(model), before)


def test_a_watched_link_is_still_what_it_was(rng):
    plain = L.BatchNormalization(CHANNELS)
    expected = repr(plain)
    optimizer = optimizers.SGD().setup(chainer.Chain(model=AdaLossScaled(L.Linear(2, 2)), norm=plain))
    assert type(plain) is L.BatchNormalization
    prepare(optimizer)
    assert repr(plain).split(" object")[0].rsplit(".")[-1] == expected.split(" object")[0].rsplit(".")[-1]
    assert isinstance(plain, L.BatchNormalization) and plain.copy().avg_mean is not None
    assert isinstance(plain.copy(), type(plain))


def test_good_steps_write_what_chainers_do(rng):
    np.random.seed(0)
    plain = Net(L.BatchNormalization)
    reference = optimizers.MomentumSGD(0.1).setup(plain)
    target = chainer.Chain(model=AdaLossScaled(copy.deepcopy(plain)))
    optimizer = prepared(target, optimizers.MomentumSGD(0.1))
    for step in STEPS[:3]:
        x = data(rng)
        step(optimizer, target.model, bad(rng))
        step(optimizer, target.model, x)
        step(reference, plain, x)
        assert_same_bits(kept(target.model.norm), kept(plain.norm))


EVENTS = st.tuples(
    st.sampled_from(["good", "bad", "bad at the end", "forward", "evaluation"]), st.sampled_from(STEPS)
)


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(EVENTS, max_size=8), name=st.sampled_from(["BatchNormalization", "BatchRenormalization"])
)
def test_a_training_with_bad_steps_is_the_training_without_them_bit_for_bit(events, name):
    np.random.seed(0)
    plain = Net(LINKS[name])
    model = AdaLossScaled(copy.deepcopy(plain))
    reference = optimizers.MomentumSGD(0.1).setup(plain)
    optimizer = prepared(model, optimizers.MomentumSGD(0.1))
    for number, (event, step) in enumerate(events):
        x, y = (data(np.random.default_rng([number, part])) for part in (0, 1))
        if event == "good":
            step(optimizer, model, x, y)
            step(reference, plain, x, y)
        elif event == "bad":
            step(optimizer, model, np.full_like(x, np.nan), y)
        elif event == "bad at the end":
            step(optimizer, model, x, np.full_like(y, np.inf))
        elif event == "forward":
            assert_same_bits({"y": model(x).array}, {"y": plain(x).array})
        else:
            with chainer.no_backprop_mode(), chainer.using_config("train", False):
                assert_same_bits({"y": model(x).array}, {"y": plain(x).array})
        assert_same_bits(kept(model), kept(plain))
        assert_same_bits(values(model), values(plain))
    assert optimizer.t == reference.t


def test_nothing_is_remembered_once_a_step_is_over(rng):
    from ada_loss.chainer import running_statistics

    with dtype("mixed16"):
        model, optimizer = started(L.BatchNormalization)
        for step in STEPS:
            step(optimizer, model, data(rng))
            assert not running_statistics._step.first and not running_statistics._step.used
