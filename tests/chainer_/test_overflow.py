"""A step whose gradients are not all finite changes nothing but the scale of the next one."""

import logging

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import optimizers

from ada_loss.arrays.library import all_finite
from ada_loss.chainer import AdaLossScaled, Diverged
from ada_loss.chainer.gradient import ScaledGradient
from helpers import assert_same_bits, dtype
from toy import a_parameter, backward, batch, compare, masters, prepared, training, values

# NumPy says so when something overflows, and here it often has to.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def rng():
    return np.random.default_rng(22)


class TestOverflow:
    def snapshot(self, optimizer, target):
        states = {
            (path, key): np.copy(value)
            for path, p in target.namedparams()
            for key, value in (p.update_rule.state or {}).items()
        }
        rules = {path: p.update_rule.t for path, p in target.namedparams()}
        return values(target), masters(target), states, rules, optimizer.t

    @pytest.mark.parametrize("make", [optimizers.MomentumSGD, optimizers.Adam])
    def test_a_skipped_step_changes_nothing(self, rng, make):
        calls = []

        class Counting:
            name, timing = "counting", "pre"

            def __call__(self, optimizer):
                calls.append(optimizer.t)

        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, make(), Counting(), hooks.WeightDecay(0.1))
            optimizer.update(target, *batch(rng))
            before = self.snapshot(optimizer, target)
            optimizer.update(target, *batch(rng, magnitude=np.inf))
            after = self.snapshot(optimizer, target)
        for old, new in zip(before[:3], after[:3], strict=True):
            assert_same_bits(new, old)
        assert before[3:] == after[3:]
        assert calls == [0]
        assert (optimizer.entry_scale.skipped, optimizer.entry_scale.exponent) == (1, -1)

    def test_one_parameter_that_overflows_skips_the_step_for_all(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target)
            backward(target, batch(rng))
            target.head.b.grad[0] = np.nan
            before = values(target)
            optimizer.update()
        assert_same_bits(values(target), before)
        assert optimizer.entry_scale.skipped == 1

    def test_the_first_step_may_overflow(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, optimizers.Adam())
            optimizer.update(target, *batch(rng, magnitude=np.inf))
            compare(target, optimizer, optimizers.Adam(), batch(rng))

    def test_a_skipped_step_is_logged_once_with_the_layer_where_it_began_and_the_new_scale(self, rng, caplog):
        with dtype("mixed16"), caplog.at_level(logging.WARNING, "ada_loss"):
            target = training(init_scale=16)
            optimizer = prepared(target)
            optimizer.update(target, *batch(rng))
            assert not caplog.records
            optimizer.update(target, *batch(rng, magnitude=np.inf))
        (record,) = caplog.records
        assert "after /head" in record.getMessage() and "2**3" in record.getMessage()

    def test_the_next_steps_run_at_the_lower_scale(self, rng):
        with dtype("mixed16"):
            target = training(method="fixed", init_scale=2.0**15)
            optimizer, data = prepared(target, optimizers.SGD(1e-7)), batch(rng, magnitude=300.0)
            while optimizer.t < 3:
                optimizer.update(target, *data)
                assert optimizer.entry_scale.skipped < 40
        assert 0 < optimizer.entry_scale.skipped == 15 - optimizer.entry_scale.exponent

    def test_a_dynamic_scale_doubles_until_it_overflows_and_stays_below_from_then_on(self, rng):
        with dtype("mixed16"):
            target = training(method="fixed", dynamic_interval=3)
            optimizer, data, exponents = (
                prepared(target, optimizers.SGD(1e-7)),
                batch(rng, magnitude=300.0),
                [],
            )
            for _ in range(30):
                optimizer.update(target, *data)
                exponents.append(optimizer.entry_scale.exponent)
        top = max(exponents)
        assert exponents[:top] == list(range(1, top + 1))
        # It overflows at the top; three good steps later it tries again.
        assert exponents[top : top + 8] == [top - 1] * 3 + [top, top - 1, top - 1, top - 1, top]

    @pytest.mark.parametrize(
        ("bad_batch", "why"),
        [(True, "no scale helps"), (False, "overflowed even at the smallest scale, 2\\*\\*-24")],
    )
    def test_a_training_that_always_overflows_ends_as_diverged_with_a_message(self, rng, bad_batch, why):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target)
            before = values(target)
            steps = 0
            with pytest.raises(Diverged, match=f"diverged: [0-9]+ steps in a row .*{why}"):
                while steps < 100:
                    steps += 1
                    target.cleargrads()
                    backward(target, batch(rng, magnitude=np.nan if bad_batch else 1.0))
                    target.head.b.grad = np.full_like(target.head.b.array, np.inf)
                    optimizer.update()
        assert steps == 32
        assert_same_bits(values(target), before)

    def test_bad_batches_do_not_lower_the_scale(self, rng):
        with dtype("mixed16"):
            target = training()
            optimizer = prepared(target, optimizers.SGD(0.0))
            for step in range(90):
                optimizer.update(target, *batch(rng, magnitude=np.nan if step % 3 == 0 else 1.0))
        assert (optimizer.entry_scale.skipped, optimizer.entry_scale.exponent) == (30, 0)

    def test_a_loss_that_float16_cannot_hold_may_have_gradients_that_it_can_at_a_smaller_scale(self, rng):
        with dtype("mixed16"):
            target = training(method="fixed", init_scale=2.0**15)
            optimizer = prepared(target, optimizers.SGD(0.0))
            optimizer.update(target, *batch(rng, magnitude=300.0))
        assert "the loss is inf:" in optimizer.last_skip.reason
        assert optimizer.entry_scale.exponent == 14

    def test_all_scopes_of_a_model_back_off_together(self, rng):
        target = chainer.Sequential(
            AdaLossScaled(L.Linear(4, 4)), AdaLossScaled(L.Linear(4, 2), init_scale=4)
        )
        optimizer = prepared(target)
        F.sum(target(np.ones((2, 4), np.float32))).backward()
        target[0].W.grad = np.full((4, 4), np.inf, np.float32)
        optimizer.update()
        assert [scope.ada_loss.policy.entry.exponent for scope in target] == [-1, 1]


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("value", [0.0, 3.0, -6e4, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("exponent", [20, 0, -15, -111, -113, -126, -127, -140])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_what_a_parameter_holds_is_finite_exactly_if_the_true_gradient_is(kind, value, exponent, scale):
    held = a_parameter(kind)
    held.receive(ScaledGradient(np.array([0, value, 1], kind), exponent), scale)
    with np.errstate(over="ignore", invalid="ignore"):
        assert all_finite(held.arrays()) == np.isfinite(held.true_gradient()).all()


def test_the_former_name_of_the_entry_scale_still_answers_with_a_warning():
    optimizer = prepared(training())
    with pytest.warns(DeprecationWarning, match="now called optimizer.entry_scale"):
        assert optimizer.overflow is optimizer.entry_scale
