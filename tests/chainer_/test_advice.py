"""What is said, once, to scripts in which a part of mixed precision is missing."""

import logging

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import ada_loss.chainer as ada
from helpers import dtype
from toy import prepared
from twins import Two, draw


@pytest.fixture
def rng():
    return np.random.default_rng(63)


def net():
    return Two(lambda m, x: m.b(F.relu(m.a(x))))


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ada_loss"]


class TestFloat32:
    def test_scripts_train_and_are_told_once_which_line_makes_float16(self, rng, caplog):
        model = ada.AdaLossScaled(net())
        optimizer, before = prepared(model), model.a.W.array.copy()
        with caplog.at_level(logging.WARNING, "ada_loss"):
            for _ in range(3):
                optimizer.update(lambda: F.sum(model(draw(rng))))
        (message,) = messages(caplog)
        assert "chainer.global_config.dtype = chainer.mixed16" in message and "inputs" in message
        assert np.isfinite(model.a.W.array).all() and (model.a.W.array != before).any()

    @pytest.mark.parametrize("precision", ["float16", "mixed16"])
    def test_scripts_in_float16_are_told_nothing(self, precision, rng, caplog):
        with dtype(precision), caplog.at_level(logging.WARNING, "ada_loss"):
            model = ada.AdaLossScaled(net())
            optimizer = prepared(model)
            optimizer.update(lambda: F.sum(model(draw(rng).astype(np.float16))))
        assert not messages(caplog)

    def test_a_part_in_float16_is_enough(self, rng, caplog):
        model = ada.AdaLossScaled(Two(lambda m, x: F.cast(F.sin(F.cast(m.b(m.a(x)), "e")), "f")))
        optimizer = prepared(model)
        with caplog.at_level(logging.WARNING, "ada_loss"):
            optimizer.update(lambda: F.sum(model(draw(rng))))
        assert not messages(caplog)


class TestFloat16Parameters:
    def step(self, loss, caplog, scale=None):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(net())
            target = chainer.Chain(model=model, side=L.Linear(4, 4))
        optimizer = prepared(target)
        x = np.ones((2, 4), np.float16)
        with caplog.at_level(logging.WARNING, "ada_loss"):
            for _ in range(3):
                target.cleargrads()
                loss(target, x).backward(loss_scale=scale)
                optimizer.update()
        return messages(caplog)

    LOSSES = {
        "beside the model": lambda t, x: F.sum(t.model(x)) + F.sum(F.cast(t.side(x), "f")),
        "in a pass of their own": lambda t, x: F.sum(F.cast(t.side(x), "f")),
    }

    @pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
    def test_with_gradients_from_outside_are_named_once(self, loss, caplog):
        (message,) = self.step(loss, caplog)
        assert "/side/" in message and "outside every scaled model" in message

    SCALED = {
        "behind the model": lambda t, x: F.sum(F.cast(t.side(F.cast(t.model(x), "e")), "f")),
        "in front of it": lambda t, x: F.sum(t.model(t.side(x))),
    }

    @pytest.mark.parametrize("loss", SCALED.values(), ids=SCALED)
    def test_next_to_a_model_are_scaled_with_it(self, loss, caplog):
        assert not self.step(loss, caplog)

    def test_with_a_loss_scale_of_their_own_are_nobodys_business(self, caplog):
        assert not self.step(self.LOSSES["in a pass of their own"], caplog, scale=128.0)


class TestInputs:
    @pytest.mark.parametrize("kind", ["float32", "float64"])
    def test_wider_than_a_float16_model_are_cast(self, kind, rng):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(net())
        x = chainer.Variable(draw(rng).astype(kind))
        model.cleargrads()
        (F.sum(model(x)) * 2.0**-24).backward()
        assert x.grad.dtype == kind and x.grad.any()
        assert all(gradient.any() for gradient in model.true_gradients().values())

    def test_that_cannot_be_cast_are_refused_in_one_sentence(self, rng):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(Two(lambda m, x: m.a(x) + x))
        with pytest.raises(TypeError, match=r"_ \+ _ is given float16 and a wider.*x.astype") as caught:
            model(chainer.Variable(draw(rng)))
        assert "\n" not in str(caught.value)

    def test_that_are_wrong_for_another_reason_are_chainers_matter(self, rng):
        model = ada.AdaLossScaled(net())
        with pytest.raises(chainer.utils.type_check.InvalidType):
            model(np.ones((2, 5), np.float32))
