"""What a link keeps of a scope's graph from call to call, and what nobody keeps."""

import gc
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from helpers import dtype, signal_to_noise
from twins import Two, assert_exact, draw, gradients, weighted_sum, wrapped_copy


class Recurrent(chainer.Chain):
    """Keeps its state between calls."""

    def __init__(self, layer=L.LSTM):
        super().__init__(inside=L.Linear(4, 4), layer=layer(4, 4), outside=L.Linear(4, 3))

    def forward(self, x):
        return self.outside(self.layer(self.inside(x)))


@pytest.fixture
def no_gc():
    """Garbage collection would hide reference cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class TestWhatALinkKeeps:
    def test_the_result_and_the_loss_of_a_classifier(self, rng):
        t = np.array([0, 3, 1], np.int32)

        def run(model, x):
            loss = model(x, t)
            assert float(model.accuracy.array) <= 1
            return loss + F.cast(0.1 * F.sum(model.y**2) + model.loss * 2, np.float32)

        link = L.Classifier(Two(lambda m, x: m.b(F.relu(m.a(x)))))
        assert_exact(link, [draw(rng)], run, decisions=2, mixed16=1)

    def test_something_inside_may_be_used_outside(self, rng):
        def compute(m, x):
            m.kept = F.relu(m.a(x))
            return m.b(m.kept) * m.kept

        def run(model, x):
            y = model(x)
            return weighted_sum(y) + weighted_sum(F.sin(model.kept))

        assert_exact(Two(compute), [draw(rng)], run, decisions=2, mixed16=1)

    def test_the_input(self, rng):
        def compute(m, x):
            m.given = x
            return m.b(F.relu(m.a(x)))

        def run(model, x):
            y = model(x)
            assert model.given is x
            return weighted_sum(y) + weighted_sum(model.given)

        assert_exact(Two(compute), [draw(rng)], run, decisions=2)

    @pytest.mark.parametrize("layer", [L.LSTM, L.StatefulGRU, L.StatefulPeepholeLSTM])
    def test_state_that_the_next_call_continues(self, layer, rng):
        def run(model, *xs):
            model.layer.reset_state()
            return sum(weighted_sum(model(x)) for x in xs)

        scaled = assert_exact(Recurrent(layer), [draw(rng) for _ in range(4)], run)
        calls = {
            decision.site.call for decision in scaled.ada_loss.decisions if decision.site.path == "/outside"
        }
        assert calls == {0, 1, 2, 3}

    def test_state_that_is_set_from_outside(self, rng):
        def run(model, x, c, h):
            model.layer.set_state(F.sin(c), F.sin(h))
            return weighted_sum(model(x)) + weighted_sum(model.layer.c)

        assert_exact(Recurrent(), [draw(rng) for _ in range(3)], run, mixed16=1)

    def test_state_that_is_detached_between_stretches_of_time(self, rng):
        # Truncated backpropagation through time: backward, then unchain, then go on from the values.
        def run(model, *xs):
            model.layer.reset_state()
            loss = 0
            for step, x in enumerate(xs):
                loss = loss + weighted_sum(model(x))
                if step in (1, 3):
                    loss.backward()
                    loss.unchain_backward()
                    loss = 0
            return loss

        assert_exact(Recurrent(), [draw(rng) for _ in range(6)], run, mixed16=1)

    def test_state_that_is_detached_before_backward(self, rng):
        def run(model, *xs):
            model.layer.reset_state()
            losses = []
            for x in xs:
                losses.append(weighted_sum(model(x)))
                model.layer.h.unchain_backward()
            return sum(losses)

        assert_exact(Recurrent(), [draw(rng) for _ in range(3)], run)

    def test_gradients_stay_in_flight_from_call_to_call(self, rng):
        with dtype("mixed16"):
            link = Recurrent()
        wide = Recurrent()
        wide.copyparams(link)
        xs = [draw(rng).astype(np.float16) for _ in range(5)]

        def run(model, *xs):
            model.layer.reset_state()
            for x in xs:
                y = model(x)
            return weighted_sum(y) * 2.0**-22

        scaled = wrapped_copy(link)
        scaled.cleargrads()
        run(scaled, *xs).backward()
        _, expected = gradients(wide, run, [x.astype(np.float32) for x in xs])
        for path, gradient in scaled.true_gradients().items():
            assert signal_to_noise(np.ldexp(gradient, 22), np.ldexp(expected[path], 22)) > 35, path


class TestMemory:
    def graph_of(self, variable):
        return weakref.ref(variable.creator_node)

    def test_the_graph_goes_with_the_loss(self, rng, no_gc):
        scaled = wrapped_copy(Two(lambda m, x: m.b(F.forget(m.a, F.relu(m.a(x))))))
        for _ in range(2):
            y = scaled(draw(rng))
            graph = self.graph_of(y)
            loss = weighted_sum(y)
            loss.backward()
            del y, loss
            assert graph() is None

    def test_the_model_goes_although_its_state_holds_a_graph(self, rng, no_gc):
        scaled = wrapped_copy(Recurrent())
        scaled(draw(rng))
        graph, model = self.graph_of(scaled.layer.h), weakref.ref(scaled)
        del scaled
        assert model() is None
        assert graph() is None

    def test_detached_state_releases_what_came_before(self, rng, no_gc):
        scaled = wrapped_copy(Recurrent())
        loss = weighted_sum(scaled(draw(rng))) + weighted_sum(scaled(draw(rng)))
        graph = self.graph_of(scaled.layer.h)
        loss.backward()
        loss.unchain_backward()
        assert scaled.layer.h.creator is None
        assert graph() is None

    def test_the_link_that_was_passed_in_is_not_kept_by_anything_else(self, no_gc):
        link = Two(lambda m, x: x)
        scaled, reference = AdaLossScaled(link), weakref.ref(link)
        del link, scaled
        assert reference() is None

    def test_a_scope_adds_nothing_to_the_graph(self, rng):
        def labels(y):
            found, waiting = [], [y.creator_node]
            while waiting:
                function = waiting.pop()
                found.append(function.label)
                waiting += [x.creator_node for x in function.inputs if x.creator_node is not None]
            return found

        link, x = Two(lambda m, x: m.b(F.relu(m.a(x))) + m.a(x)), draw(rng)
        assert labels(wrapped_copy(link)(x)) == labels(link(x))
