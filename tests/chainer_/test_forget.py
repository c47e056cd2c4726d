"""F.forget, dropout and running statistics: what is computed again, or remembered, is the same."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.core.config import TIMINGS
from helpers import assert_same_bits
from twins import Graph, assert_exact, draw, exact, gradients, weighted_sum, wrapped_copy


class TestForget:
    def forgetting(self, m, x):
        return F.forget(lambda h: m.b(F.relu(m.a(h))), x) + m.c(x)

    def test_inside_a_scope(self, rng):
        scaled = exact(rng, self.forgetting, decisions=3)
        assert {d.site.path for d in scaled.ada_loss.decisions} == {"/a", "/b", "/c"}

    def test_with_shared_parameters(self, rng):
        # Plain Chainer loses gradients here: its outer pass overwrites what the recomputation has added.
        def remembering(m, x):
            return m.b(F.relu(m.a(x))) + m.a(m.c(x))

        link, x = Graph(lambda m, x: F.forget(lambda h: m.b(F.relu(m.a(h))), x) + m.a(m.c(x))), draw(rng)
        _, found = gradients(wrapped_copy(link), lambda model, x: weighted_sum(model(x)), [x])
        link.combine = remembering
        _, expected = gradients(link, lambda model, x: weighted_sum(model(x)), [x])
        assert_same_bits(found, expected)

    @pytest.mark.parametrize("timing", TIMINGS)
    @pytest.mark.parametrize("interval", [1, 3])
    def test_a_forgotten_layer_that_is_used_outside_as_well_has_a_site_of_its_own(
        self, interval, timing, rng
    ):
        # Gradients are cleared between forward and backward, as optimizers do it.
        def combine(m, x):
            return F.forget(lambda h: 0.001 * m.a(h), F.tanh(m.a(x))) + x

        link = Graph(combine)
        reference = Graph(lambda m, x: 0.001 * m.a(F.tanh(m.a(x))) + x)
        reference.copyparams(link)
        scaled = wrapped_copy(link, update_per_n_iteration=interval, timing=timing)
        for _ in range(3):
            x = draw(rng)
            for model in (scaled, reference):
                loss = weighted_sum(model(chainer.Variable(x)))
                model.cleargrads()
                loss.backward()
            assert {decision.site.call for decision in scaled.ada_loss.decisions} == {0, 1}
            assert_same_bits({"W": scaled.a.W.grad}, {"W": reference.a.W.grad})

    def test_several_inputs_and_outputs(self, rng):
        def combine(m, x, y):
            return F.forget(lambda p, q: (m.a(p) * q, m.b(q), p), x, m.c(y))

        exact(rng, combine, inputs=2, decisions=3)

    def test_nested(self, rng):
        def combine(m, x):
            inner = lambda h: F.forget(lambda k: F.tanh(m.a(k)), m.b(h))  # noqa: E731
            return F.forget(inner, m.c(x))

        exact(rng, combine, decisions=3)

    def test_a_variable_in_a_closure(self, rng):
        def combine(m, x):
            h = m.a(x)
            return F.forget(lambda y: m.b(y) * h, m.c(x))

        exact(rng, combine, decisions=3)

    def test_leaves_that_are_reached_through_a_closure_as_well(self, rng):
        # Plain Chainer loses what the recomputation has added to them.
        def forgetting(m, x):
            h = F.sin(F.sin(F.sin(m.a(x))))
            return F.forget(lambda y: m.b(y) * h, x) + F.sin(F.sin(F.sin(F.sin(F.sin(m.c(x)))) + x))

        def remembering(m, x):
            h = F.sin(F.sin(F.sin(m.a(x))))
            return m.b(x) * h + F.sin(F.sin(F.sin(F.sin(F.sin(m.c(x)))) + x))

        link, x = Graph(forgetting), draw(rng)
        _, found = gradients(wrapped_copy(link), lambda model, x: weighted_sum(model(x)), [x])
        link.combine = remembering
        _, expected = gradients(link, lambda model, x: weighted_sum(model(x)), [x])
        for path, gradient in expected.items():
            np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-6, err_msg=path)

    def test_batch_normalization_counts_its_statistics_once(self, rng):
        class Net(chainer.Chain):
            def __init__(self):
                super().__init__(a=L.Linear(4, 4), bn=L.BatchNormalization(4))

            def forward(self, x):
                return F.forget(lambda h: self.bn(self.a(h)), F.sin(x))

        link = Net()
        scaled = assert_exact(link, [draw(rng, 5, 4)])
        np.testing.assert_array_equal(scaled.bn.avg_mean, link.bn.avg_mean)

    def test_around_a_scope(self, rng):
        def run(model, x):
            return weighted_sum(F.forget(model, F.sin(x)))

        exact(rng, lambda m, x: m.b(F.relu(m.a(x))), run, decisions=2)

    @pytest.mark.parametrize("around", [False, True])
    def test_with_a_loss_scale(self, around, rng):
        link = Graph(self.forgetting)
        x = draw(rng)
        expected = gradients(link, lambda model, x: weighted_sum(model(x)), [x])[1]
        scaled = wrapped_copy(link)
        scaled.cleargrads()
        weighted_sum(F.forget(scaled, x) if around else scaled(x)).backward(loss_scale=64)
        assert_same_bits(scaled.true_gradients(), {path: expected[path] for path, _ in link.namedparams()})

    def test_a_forgotten_part_without_parameters(self, rng):
        exact(rng, lambda m, x: m.b(F.forget(F.sin, m.a(x))), decisions=2)


class TestRandomAndRunningState:
    def test_dropout_drops_the_same_on_the_way_back(self, rng):
        exact(rng, lambda m, x: m.b(F.dropout(F.relu(m.a(x)), 0.4)) + F.dropout(m.c(x)))

    @pytest.mark.parametrize("train", [True, False])
    def test_batch_normalization_keeps_its_statistics(self, train, rng):
        class Net(chainer.Chain):
            def __init__(self):
                super().__init__(a=L.Convolution2D(2, 3, 3), bn=L.BatchNormalization(3), b=L.Linear(27, 2))

            def forward(self, x):
                return self.b(F.relu(self.bn(self.a(x))))

        link = Net()
        with chainer.using_config("train", train):
            scaled = assert_exact(link, [draw(rng, 4, 2, 5, 5)])
        np.testing.assert_array_equal(scaled.bn.avg_var, link.bn.avg_var)
        np.testing.assert_array_equal(scaled.bn.avg_mean, link.bn.avg_mean)
