"""The message about a skipped step says where its numbers stopped being finite, not where that showed."""

import logging

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers

import pretended_gpu
from ada_loss.chainer import AdaLossScaled, Diverged
from ada_loss.chainer import functions as ada_functions
from ada_loss.core.config import TIMINGS
from helpers import dtype
from toy import prepared

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZE = 4


class Net(chainer.Chain):
    """Four layers, whose names do not tell their order, and what is given between two of them."""

    def __init__(self, between=F.identity):
        super().__init__()
        with self.init_scope():
            self.c, self.a, self.d, self.b = (L.Linear(SIZE, SIZE, initialW=np.eye(SIZE)) for _ in range(4))
        self.between = between

    def forward(self, x):
        return self.b(self.d(self.between(self.a(self.c(x)))))


def scaled(between=F.identity, method="fixed", kind="mixed16", **settings):
    with dtype(kind):
        return AdaLossScaled(Net(between), method, **settings)


def data(value=None, kind="float16"):
    x = np.random.default_rng(28).uniform(2.0**-11, 2.0**-10, (3, SIZE)).astype(kind)
    if value is not None:
        x[1, 2] = value
    return x


FACTORS = np.random.default_rng(29).uniform(0.5, 1, (2000, SIZE)).astype(np.float32)


def loss_of(model, x, weight=1.0):
    y = F.cast(model(x), "float32")
    return F.sum(y * FACTORS[: len(y), : y.shape[1]]) * np.float32(weight)


def by_function(optimizer, model, *args):
    optimizer.update(lambda: loss_of(model, *args))


def by_hand(optimizer, model, *args):
    model.cleargrads()
    loss_of(model, *args).backward()
    optimizer.update()


def reason(model, *args, step=by_function, target=None):
    """Why the step was skipped."""
    optimizer = prepared(target or model, optimizers.SGD(0.0))
    step(optimizer, model, *args)
    assert optimizer.entry_scale.skipped == 1
    return optimizer.last_skip.reason


FORWARD = "numbers stopped being finite on the forward pass, at "
WENT_IN = "numbers were not finite on the forward pass, at "
BACKWARD = "a gradient stopped being finite on the backward pass, "
LOSS = "the loss is {}, which no scale can help: "

LAYER = "LinearFunction"


@pytest.fixture(params=[by_function, by_hand])
def step(request):
    return request.param


def enlarging(model):
    """Let the layer `a` make gradients a thousand times as large."""
    model.a.W.array[:] = np.eye(SIZE) * 2.0**10


ENOUGH = 2.0**9
"""A weight of the loss with which gradients overflow there, and nothing in the forward pass does."""


class TestOnTheBackwardPass:
    @pytest.mark.parametrize("timing", TIMINGS)
    @pytest.mark.parametrize("every", [1, 5])
    @pytest.mark.parametrize("steps", [0, 1])
    def test_at_the_layer_whose_input_gradient_overflows(self, step, timing, every, steps):
        model = scaled(timing=timing, update_per_n_iteration=every)
        optimizer = prepared(model, optimizers.SGD(0.0))
        for _ in range(steps):
            step(optimizer, model, data())
        model.a.W.array[:] = np.eye(SIZE) * 2.0**10
        step(optimizer, model, data(), ENOUGH)
        assert optimizer.entry_scale.skipped == 1
        assert optimizer.last_skip.reason == f"{BACKWARD}at /a ({LAYER})"

    def test_at_a_layer_whose_weight_gradient_alone_overflows(self, step):
        # It adds up over the batch, under `fixed` at the scale of what it is computed from.
        x = np.repeat(data(), 600, 0) * np.float16(2.0**10)
        gone = ", or on the forward pass, whose graph is gone" if step is by_hand else ""
        assert reason(scaled(), x, 2.0**7, step=step) == f"{BACKWARD}at /b ({LAYER}){gone}"

    def test_at_a_function_between_layers(self, step):
        model = scaled(lambda h: F.sqrt(F.relu(h)))
        model.a.b.array[:] = -60
        assert reason(model, data(), step=step) == f"{BACKWARD}at sqrt after /a ({LAYER})"

    def test_at_a_function_outside_the_model(self, step):
        model = scaled()
        optimizer = prepared(model)

        def loss():
            return F.sum(F.sqrt(F.relu(F.cast(model(data()), "float32") - 100)))

        optimizer.update(loss)
        assert optimizer.last_skip.reason == f"{BACKWARD}at sqrt after /b ({LAYER})"

    def test_as_gradients_enter(self):
        model = scaled(init_scale=2.0**20, output_dtype=None)
        optimizer = prepared(model)
        model.cleargrads()
        y = model(data())
        y.grad = np.ones_like(y.array)
        y.backward()
        optimizer.update()
        assert optimizer.last_skip.reason == f"{BACKWARD}as it began, at /b ({LAYER})"

    def test_at_the_name_that_a_product_was_given(self, step):
        model = scaled(
            lambda h: ada_functions.matmul(h, 2.0**10 * np.eye(SIZE, dtype=np.float16), name="mix")
        )
        assert reason(model, data(), 2.0**12, step=step) == f"{BACKWARD}at mix (MatMul)"

    def test_at_a_normalization(self, step):
        with dtype("mixed16"):
            model = AdaLossScaled(chainer.Sequential(Net(), L.BatchNormalization(SIZE)), "fixed")
        model[1].gamma.array[:] = 2.0**10
        assert reason(model, data(), ENOUGH, step=step) == f"{BACKWARD}at /1 (BatchNormalization)"

    def test_inside_what_is_forgotten(self, step):
        model = scaled(lambda h: F.forget(lambda x: F.sqrt(F.relu(x)), h))
        model.a.b.array[:] = -60
        assert reason(model, data(), step=step).startswith(f"{BACKWARD}at sqrt")

    def test_paths_are_those_of_the_optimizers_model(self, step):
        model = scaled()
        enlarging(model)
        target = chainer.Chain(outer=model)
        assert reason(model, data(), ENOUGH, step=step, target=target) == f"{BACKWARD}at /outer/a ({LAYER})"

    def test_in_the_first_pass_of_several_that_overflows(self):
        model = scaled()
        optimizer = prepared(model, optimizers.SGD(0.0))
        enlarging(model)
        model.cleargrads()
        for weight in (1.0, ENOUGH, 1.0, np.inf):
            loss_of(model, data(), weight).backward()
        optimizer.update()
        assert optimizer.last_skip.reason == f"{BACKWARD}at /a ({LAYER})"

    def test_masks_of_infinity_are_not_to_blame(self, step):
        mask = np.where(np.eye(SIZE, dtype=bool)[:3], np.float16(-np.inf), np.float16(0))
        model = scaled(lambda h: h + F.softmax(h + mask))
        enlarging(model)
        assert reason(model, data(), 2 * ENOUGH, step=step) == f"{BACKWARD}at /a ({LAYER})"

    def test_where_only_the_gradient_itself_was_made_infinite(self):
        model = scaled()
        optimizer = prepared(model)
        model.cleargrads()
        loss_of(model, data()).backward()
        model.d.W.grad[0, 0] = np.inf
        optimizer.update()
        assert "/d" in optimizer.last_skip.reason


class TestOnTheForwardPass:
    def test_at_the_first_layer_that_overflows(self, step):
        model = scaled()
        model.a.W.array[:] *= np.float16(2.0**15)
        model.c.b.array[:] = 4
        assert reason(model, data(), step=step) == f"{LOSS.format('nan')}{FORWARD}/a ({LAYER})"

    def test_at_a_function_whose_result_nobody_keeps(self, step):
        model = scaled(lambda h: F.exp(h * 40.0) - 1.0)
        model.a.b.array[:] = 1
        assert reason(model, data(), step=step) == f"{LOSS.format('nan')}{FORWARD}exp after /a ({LAYER})"

    def test_also_where_the_loss_is_finite_again(self, step):
        model = scaled(lambda h: F.tanh(F.exp(h * 40.0)))
        model.a.b.array[:] = 1
        assert reason(model, data(), step=step) == f"{FORWARD}exp after /a ({LAYER})"

    def test_also_where_only_a_weight_gradient_shows_it(self):
        model = scaled(F.tanh)
        model.c.W.array[:] = np.inf
        model.a.W.array[:] = 1
        message = reason(model, data(1.0))
        assert f"{WENT_IN}/c ({LAYER}): those of a parameter" in message

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_at_the_layer_that_a_bad_batch_went_into(self, step, value):
        message = reason(scaled(), data(value), step=step)
        assert message == f"{LOSS.format('nan')}{WENT_IN}/c ({LAYER}): those that went in"

    def test_at_the_cast_of_an_input_of_which_nothing_is_known_any_more(self, step):
        message = reason(scaled(), data(1e6, "float32"), step=step)
        assert message == (
            f"{LOSS.format('nan')}{FORWARD}Cast before /c ({LAYER}), if those that went in were"
        )

    def test_at_a_layer_with_a_weight_that_is_not_finite(self, step):
        model = scaled()
        model.d.W.array[0, 0] = np.nan
        message = reason(model, data(), step=step)
        assert message == f"{LOSS.format('nan')}{WENT_IN}/d ({LAYER}): those of a parameter"

    def test_at_the_loss_itself(self):
        model = scaled()
        optimizer = prepared(model)
        optimizer.update(lambda: loss_of(model, data(), np.nan))
        message = optimizer.last_skip.reason
        assert message.startswith(f"{LOSS.format('nan')}{FORWARD}")
        assert message.endswith(f"_ * nan after /b ({LAYER})")

    def test_before_what_is_forgotten(self, step):
        model = scaled(lambda h: F.forget(F.tanh, h))
        assert f"{WENT_IN}/c ({LAYER})" in reason(model, data(np.nan), step=step)

    def test_in_float32(self, step):
        model = scaled(kind="float32")
        assert f"{WENT_IN}/c ({LAYER})" in reason(model, data(np.nan, "float32"), step=step)

    def test_at_a_target_that_is_not_finite(self):
        model = scaled()
        optimizer = prepared(model)
        t = np.full((3, SIZE), np.inf, np.float32)
        optimizer.update(lambda: F.mean_squared_error(model(data()), t))
        assert (
            f"{WENT_IN}MeanSquaredError after /b ({LAYER}): those that went in" in optimizer.last_skip.reason
        )

    def test_in_an_embedding(self):
        with dtype("mixed16"):
            model = AdaLossScaled(chainer.Sequential(L.EmbedID(5, SIZE), L.Linear(SIZE, 2)))
        model[0].W.array[3] = np.nan
        message = reason(model, np.array([1, 3], np.int32))
        assert f"{WENT_IN}/0 (EmbedIDFunction): those of a parameter" in message


def test_the_log_says_it_at_once_in_one_line(caplog):
    model = scaled(init_scale=16)
    with caplog.at_level(logging.WARNING, "ada_loss"):
        message = reason(model, data(np.nan))
    (record,) = caplog.records
    assert record.getMessage() == f"Skipped a step, 1 so far: {message}. The scale stays 2**4."


def test_a_run_that_diverged_says_where_the_last_step_overflowed():
    model = scaled()
    optimizer = prepared(model)
    with pytest.raises(Diverged, match=r"in the last one the loss is nan, .* on the forward pass, at /c"):
        for _ in range(100):
            by_function(optimizer, model, data(np.nan))


def test_a_good_step_has_no_reason_and_the_next_bad_one_its_own():
    model = scaled()
    optimizer = prepared(model, optimizers.SGD(0.0))
    by_function(optimizer, model, data(np.nan))
    by_function(optimizer, model, data())
    assert optimizer.last_skip is None
    enlarging(model)
    by_function(optimizer, model, data(), 2 * ENOUGH)
    assert optimizer.last_skip.reason == f"{BACKWARD}at /a ({LAYER})"


def test_looking_draws_no_random_numbers_and_calls_nothing_of_the_users(step):
    calls = []

    class Mine(chainer.FunctionNode):
        def forward(self, inputs):
            calls.append("forward")
            return (inputs[0] * 1,)

        def backward(self, targets, gys):
            return gys

    model = scaled(lambda h: F.dropout(Mine().apply((F.rrelu(h),))[0], 0.5), kind="float32")
    optimizer = prepared(model, optimizers.SGD(0.0))
    states = []
    for value in (None, np.nan):
        np.random.seed(5)
        step(optimizer, model, data(value, "float32"))
        states.append(np.random.get_state()[1:3])
    assert optimizer.entry_scale.skipped == 1
    assert np.array_equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]
    assert calls == ["forward"] * 2


class TestOnAGpu:
    @pytest.fixture
    def gpu(self, monkeypatch):
        return pretended_gpu.pretend(monkeypatch)

    def test_a_loss_that_is_not_finite_is_traced_while_its_graph_is_there(self, gpu):
        model = scaled()
        optimizer = prepared(model)
        loss = loss_of(model, data(np.nan))
        model.cleargrads()
        looks = gpu.looks
        loss.backward()
        assert gpu.looks == looks
        optimizer.update()
        message = f"{LOSS.format('nan')}{WENT_IN}/c ({LAYER}): those that went in"
        assert optimizer.last_skip.reason == message

    def test_and_is_named_after_it(self, gpu):
        assert reason(scaled(), data(np.nan), step=by_hand).startswith(LOSS.format("nan"))

    def test_on_the_way_back_the_first_layer_is_named_that_was_reached(self, gpu):
        model = scaled()
        enlarging(model)
        assert reason(model, data(), ENOUGH) == f"{BACKWARD}at /c ({LAYER}) or before it"
