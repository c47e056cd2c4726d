"""Learning rates and their schedules while steps are skipped: `optimizer.t` counts the updates made."""

import chainer
import numpy as np
import pytest
from chainer import optimizers
from chainer.training import StandardUpdater, Trainer, extensions

from ada_loss.chainer import prepare
from helpers import assert_same_bits, dtype
from toy import Twin, batch, prepared, training, values

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*renamed to AdamRule.alpha_t:DeprecationWarning"),
]

OPTIMIZERS = {
    name: found
    for name, found in vars(optimizers).items()
    if isinstance(found, type) and issubclass(found, chainer.Optimizer)
}

RATES = {
    (name, rate)
    for name, optimizer in OPTIMIZERS.items()
    for rate in ("lr", "alpha", "alpha_t")
    if hasattr(optimizer, rate)
    or rate in getattr(optimizer(), "hyperparam", chainer.optimizer.Hyperparameter()).get_dict()
}

SHIFTS = {
    "ExponentialShift": lambda name: extensions.ExponentialShift(name, 0.5),
    "InverseShift": lambda name: extensions.InverseShift(name, 0.5, 2.0),
    "LinearShift": lambda name: extensions.LinearShift(name, (0.5, 0.1), (1, 4)),
    "MultistepShift": lambda name: extensions.MultistepShift(name, 0.1, [2, 4], 0.5),
    "PolynomialShift": lambda name: extensions.PolynomialShift(name, 2.0, 8),
    "StepShift": lambda name: extensions.StepShift(name, 0.5, 2, 0.5),
    "WarmupShift": lambda name: extensions.WarmupShift(name, 0.1, 3, 0.5),
}


def trained(optimizer, bad, *others, steps=5):
    """What a trainer observed in each iteration; the batches at `bad` overflow."""
    rng = np.random.default_rng(4)
    x, t = batch(rng, 2 * steps)
    for iteration in bad:
        t[2 * iteration] = np.inf
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, t), 2, shuffle=False)
    trainer = Trainer(StandardUpdater(iterator, optimizer), (steps, "iteration"))
    for extension in others:
        trainer.extend(extension, trigger=(1, "iteration"))
    seen = []
    trainer.extend(
        lambda trainer: seen.append(dict(trainer.observation)), trigger=(1, "iteration"), name="seen"
    )
    trainer.run(show_loop_exception_msg=False)
    return seen


@pytest.fixture
def rng():
    return np.random.default_rng(25)


@pytest.mark.parametrize("name, rate", sorted(RATES))
def test_every_rate_of_every_optimizer_can_be_observed_from_the_first_skipped_step_on(name, rate):
    with dtype("mixed16"):
        optimizer = prepared(training(), OPTIMIZERS[name]())
        watch = extensions.observe_value(
            "rate", lambda trainer: getattr(trainer.updater.get_optimizer("main"), rate)
        )
        observed = [each["rate"] for each in trained(optimizer, [0, 2], watch)]
    assert optimizer.t == 3 and optimizer.entry_scale.skipped == 2
    reference = OPTIMIZERS[name]()
    for t, found in zip([1, 1, 1, 2, 3], observed, strict=True):
        reference.t = t
        assert found == getattr(reference, rate)


def test_adam_corrects_its_bias_by_the_updates_that_were_made(rng):
    with dtype("mixed16"):
        target = training()
        optimizer, twin = prepared(target, optimizers.Adam(0.01)), Twin(target)
        reference = optimizers.Adam(0.01).setup(twin)
        for magnitude in (np.inf, 1.0, np.inf, np.inf, 1.0, 1.0):
            optimizer.update(target, *batch(rng, magnitude=magnitude))
            if np.isfinite(magnitude):
                twin.take_gradients(target)
                reference.update()
                assert (optimizer.t, optimizer.alpha_t) == (reference.t, reference.alpha_t)
                twin.assert_is(target)
    assert {parameter.update_rule.t for parameter in target.params()} == {3}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("make, rate", [(optimizers.MomentumSGD, "lr"), (optimizers.Adam, "alpha")])
def test_schedules_count_the_trainers_iterations_whether_or_not_a_step_was_skipped(shift, make, rate):
    watch = extensions.observe_value(
        "rate", lambda trainer: getattr(trainer.updater.get_optimizer("main"), rate)
    )
    found = []
    for bad in ([], [0, 3]):
        with dtype("mixed16"):
            observed = trained(prepared(training(), make()), bad, SHIFTS[shift](rate), watch)
        found.append([each["rate"] for each in observed])
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_asking_for_the_rate_changes_nothing(rng):
    found = []
    for asks in (False, True):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, optimizers.Adam(0.01))
            assert not asks or optimizer.alpha_t > 0
            optimizer.update(target, *batch(np.random.default_rng(1)))
        found.append(values(target))
    assert_same_bits(*found)


def test_an_optimizer_that_is_not_prepared_answers_as_before():
    optimizer = optimizers.Adam().setup(training())
    with pytest.raises(RuntimeError, match="have not been started"):
        _ = optimizer.alpha_t
    assert prepare(optimizer).alpha_t > 0
