"""The engine: in float32 a scope's gradients are plain Chainer's, bit for bit, whatever the graph."""

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import link_hooks

from helpers import dtype, signal_to_noise
from twins import Graph, Noting, assert_exact, draw, exact, weighted_sum, wide, wrapped_copy


class TestGraphs:
    def test_skip_connections(self, rng):
        def combine(m, x):
            h = F.relu(m.a(x))
            return m.c(h + m.b(h)) + h + x

        scaled = exact(rng, combine, decisions=3)
        assert len({decision.exponent for decision in scaled.ada_loss.decisions}) > 1

    def test_concatenation_and_splitting(self, rng):
        def combine(m, x):
            left, middle, right = F.split_axis(F.concat([m.a(x), m.b(x), x]), 3, axis=1)
            return m.c(left) * middle, F.tanh(right)

        exact(rng, combine)

    def test_functions_with_outputs_that_nobody_uses(self, rng):
        def combine(m, x):
            _, middle, _ = F.split_axis(F.concat([m.a(x), m.b(x), x]), 3, axis=1)
            return m.c(middle)

        exact(rng, combine, decisions=3)

    def test_a_layer_used_several_times(self, rng):
        exact(rng, lambda m, x: m.a(F.sin(m.a(F.relu(m.a(x))))) + m.b(m.a(x)), decisions=5)

    def test_a_variable_used_several_times_by_one_function(self, rng):
        exact(rng, lambda m, x: F.concat([m.a(x)] * 3) * F.concat([x, x, m.b(x)]))

    def test_a_variable_times_itself(self, rng):
        def combine(m, x):
            h = m.a(x)
            return h * h * h

        exact(rng, combine)

    def test_one_layers_weight_as_anothers_input(self, rng):
        exact(rng, lambda m, x: F.linear(x, m.a(m.b.W), m.b.b))

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_results_are_added_in_the_order_in_which_chainer_meets_them(self, order, rng):
        # Each result reaches the shared layer with its own gradient; the sum of three depends on their order.
        def combine(m, x):
            h = m.a(x)
            return m.b(h), m.c(h), F.linear(h, m.b.W)

        def run(model, x):
            results = model(x)
            return sum(weighted_sum(results[place]) * (0.1 + place) for place in order)

        exact(rng, combine, run, decisions=4)

    def test_results_of_very_different_depth(self, rng):
        def combine(m, x):
            h = m.a(x)
            deep = h
            for _ in range(4):
                deep = F.relu(m.b(deep)) + h
            return deep, m.c(h), h, x

        def run(model, x):
            deep, near, h, given = model(x)
            return weighted_sum(near) + weighted_sum(h) + weighted_sum(deep * given)

        exact(rng, combine, run)

    def test_inputs_that_are_used_outside_as_well(self, rng):
        def run(model, x):
            return weighted_sum(model(x * 2) + wide(x)) + weighted_sum(model(x)) + F.sum(wide(x))

        exact(rng, lambda m, x: m.b(F.relu(m.a(x))) + x, run)

    def test_several_inputs_of_which_one_is_not_used(self, rng):
        exact(rng, lambda m, x, y, z: m.a(x) * m.b(z), inputs=3)

    def test_a_network_of_float64(self, rng):
        with dtype("float64"):
            link = Graph(lambda m, x: m.c(F.tanh(m.a(x)) + m.b(x)))
        assert_exact(link, [rng.standard_normal((3, 4))])

    def test_lazy_summation_of_gradients(self, rng):
        with chainer.using_config("lazy_grad_sum", True):
            exact(rng, lambda m, x: m.a(x) + m.a(F.relu(x)) + m.a(m.a(x)))

    def test_arrays_without_elements(self):
        link = Graph(lambda m, x: m.b(F.relu(m.a(x))) + m.c(x))
        scaled = assert_exact(link, [np.zeros((0, 4), np.float32)], decisions=3)
        assert not any(decision.shift for decision in scaled.ada_loss.decisions)

    def test_gradients_of_zeros(self, rng):
        scaled = exact(rng, lambda m, x: m.b(F.relu(m.a(x))) * 0, decisions=2)
        assert not any(decision.shift for decision in scaled.ada_loss.decisions)

    def test_an_old_style_function(self, rng):
        class Double(chainer.Function):
            def forward(self, inputs):
                return (2 * inputs[0],)

            def backward(self, inputs, gys):
                return (2 * gys[0],)

        exact(rng, lambda m, x: m.b(Double()(m.a(x))), decisions=2)

    def test_a_function_that_accumulates_by_itself(self, rng):
        class Sum(chainer.FunctionNode):
            def forward(self, inputs):
                return (inputs[0] + inputs[1],)

            def backward_accumulate(self, targets, gys, present):
                return tuple(gys[0] if g is None else g + gys[0] for g in present)

        def combine(m, x):
            h = m.a(x)
            return m.b(h) + Sum().apply((h, m.c(x)))[0]

        exact(rng, combine, decisions=3)

    def test_a_function_with_a_wrong_number_of_gradients_is_named(self, rng):
        class Wrong(chainer.FunctionNode):
            def forward(self, inputs):
                return (sum(inputs),)

            def backward(self, targets, gys):
                return gys * 2

        scaled = wrapped_copy(Graph(lambda m, x: Wrong().apply((m.a(x), m.b(x), x))[0]))
        with pytest.raises(ValueError, match="Wrong.*2 gradients.*3"):
            weighted_sum(scaled(chainer.Variable(draw(rng)))).backward()

    def test_a_gradient_of_the_wrong_shape_is_chainers_error(self, rng):
        class Wrong(chainer.FunctionNode):
            def forward(self, inputs):
                return inputs

            def backward(self, targets, gys):
                return (gys[0][:, :1],)

        scaled = wrapped_copy(Graph(lambda m, x: Wrong().apply((m.a(x),))[0]))
        with pytest.raises(ValueError, match="Wrong"):
            weighted_sum(scaled(chainer.Variable(draw(rng)))).backward()


class TestInputsWithoutGradient:
    def test_data_as_an_array(self, rng):
        x = draw(rng)
        exact(rng, lambda m, y: m.a(y) * m.b(x.astype(y.dtype)), decisions=1)
        assert_exact(Graph(lambda m: m.b(F.relu(m.a(x.astype(m.a.W.dtype))))), [], decisions=1)

    def test_a_variable_that_requires_none(self, rng):
        x = chainer.Variable(draw(rng), requires_grad=False)

        def combine(m):
            data = F.cast(x, m.a.W.dtype)
            return m.b(F.relu(m.a(data)) * data)

        assert_exact(Graph(combine), [], decisions=1)
        assert x.grad is None

    def test_integers(self, rng):
        ids = np.array([0, 2, 2], np.int32)
        link = Graph(lambda m, i: m.b(F.embed_id(i, m.a.W)))
        scaled = assert_exact(link, [ids], decisions=1)
        assert scaled.c.W.grad is None

    def test_a_function_that_returns_none(self, rng):
        exact(rng, lambda m, x: m.a(x) + F.where(x.array > 0, m.b(x), F.sign(m.c(x))))

    def test_nothing_that_requires_a_gradient(self, rng):
        x = draw(rng)
        y = wrapped_copy(Graph(lambda m, x: F.sin(x)))(x)
        assert not y.requires_grad
        np.testing.assert_array_equal(y.array, F.sin(x).array)


class TestAccumulation:
    def test_over_several_passes_in_chainers_order(self, rng):
        first, second = draw(rng), draw(rng)

        def run(model, x):
            for data in (first, second):
                weighted_sum(model(data.astype(x.dtype))).backward()
            return weighted_sum(model(x))

        exact(rng, lambda m, x: m.a(F.sin(m.a(m.a(x)))) + m.b(x) * m.b(F.sin(x)), run, mixed16=1)

    def test_over_passes_between_which_gradients_were_read(self, rng):
        data = draw(rng)

        def run(model, x):
            weighted_sum(model(data.astype(x.dtype))).backward()
            assert all(parameter.grad is not None for parameter in model.params())
            return weighted_sum(model(x))

        exact(rng, lambda m, x: m.a(F.sin(m.a(m.a(x)))) + m.b(m.c(x)), run, mixed16=1)

    def test_over_two_passes_through_one_graph(self, rng):
        def run(model, x):
            loss = weighted_sum(model(x))
            loss.backward()
            return loss

        exact(rng, lambda m, x: m.c(m.a(x) + m.b(F.relu(m.a(x)))), run, mixed16=1)

    def test_from_inside_and_outside_the_scope(self, rng):
        def run(model, x):
            return weighted_sum(model(x)) + 0.5 * wide(F.sum(model.a.W**2)) + wide(F.sum(model.b(x) * 3))

        exact(rng, lambda m, x: m.b(F.relu(m.a(x))), run, mixed16=1)

    def test_of_a_pass_through_the_scope_and_a_plain_one(self, rng):
        data = draw(rng)

        def run(model, x):
            weighted_sum(model(data.astype(x.dtype))).backward()
            return weighted_sum(model.a(x))

        exact(rng, lambda m, x: m.b(F.relu(m.a(x))), run, mixed16=1)

    def test_on_inputs(self, rng):
        def run(model, x):
            weighted_sum(model(x)).backward()
            weighted_sum(x).backward()
            return weighted_sum(model(F.sin(x)))

        exact(rng, lambda m, x: m.a(x) + m.b(x) + x, run, mixed16=1)


class TestRetainedGradients:
    def test_of_everything_in_between(self, rng):
        def combine(m, x):
            m.kept = [m.a(x)]
            m.kept.append(F.relu(m.kept[0]))
            m.kept.append(m.b(m.kept[1]) + m.kept[0])
            return m.c(m.kept[2]) * m.kept[0]

        found = []
        link = Graph(combine)
        for model in (link, wrapped_copy(link)):
            x = chainer.Variable(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
            outside = F.sin(x)
            y = model(outside)
            weighted_sum(y).backward(retain_grad=True)
            found.append([variable.grad for variable in (*model.kept, outside, y, x)])
        for ours, plain in zip(*found[::-1], strict=True):
            np.testing.assert_array_equal(ours, plain)

    def test_in_float16_are_the_true_ones(self, rng):
        def combine(m, x):
            m.kept = F.relu(m.a(x))
            return m.b(m.kept) + m.c(m.kept)

        with dtype("mixed16"):
            link = Graph(combine)
        wide = Graph(combine)
        wide.copyparams(link)
        x, found = draw(rng).astype(np.float16), []
        for model, data in ((wrapped_copy(link), x), (wide, x.astype(np.float32))):
            weighted_sum(model(data)).backward(retain_grad=True)
            found.append(model.kept.grad)
        assert found[0].dtype == np.float16
        assert signal_to_noise(*found) > 45

    def test_are_not_kept_otherwise(self, rng):
        def combine(m, x):
            m.kept = m.a(x)
            return m.b(m.kept)

        scaled = wrapped_copy(Graph(combine))
        weighted_sum(scaled(draw(rng))).backward()
        assert scaled.kept.grad is None


class TestUnchaining:
    def test_inside_the_link(self, rng):
        def combine(m, x):
            h = m.a(x)
            h.unchain_backward()
            return m.b(h) + m.c(x)

        def run(model, x):
            return weighted_sum(model(F.sin(x)))

        assert_exact(Graph(combine), [draw(rng)], run, decisions=2)

    def test_of_a_kept_variable_before_backward(self, rng):
        def combine(m, x):
            m.kept = m.a(x)
            return m.b(m.kept) + m.c(x)

        def run(model, x):
            y = model(x)
            model.kept.unchain()
            return weighted_sum(y)

        exact(rng, combine, run, decisions=2)

    def test_of_the_loss(self, rng):
        scaled = wrapped_copy(Graph(lambda m, x: m.b(m.a(x))))
        loss = weighted_sum(scaled(draw(rng)))
        loss.unchain_backward()
        scaled.cleargrads()
        loss.backward()
        assert all(parameter.grad is None for parameter in scaled.params())


class TestHooks:
    def combine(self, m, x):
        h = F.relu(m.a(x))
        return m.b(h) + m.c(h)

    def test_of_functions_are_called_as_chainer_calls_them(self, rng):
        link, notes = Graph(self.combine), []
        for model in (link, wrapped_copy(link)):
            with Noting() as hook:
                weighted_sum(model(draw(rng))).backward()
            notes.append(hook.calls)
        assert notes[1] == notes[0]

    def test_of_one_function_are_called(self, rng):
        hook = Noting()

        def combine(m, x):
            y = m.a(x)
            y.creator_node.add_hook(hook)
            return F.relu(y)

        scaled = wrapped_copy(Graph(combine))
        weighted_sum(scaled(draw(rng))).backward()
        assert [call[:2] for call in hook.calls] == [
            ("before", "LinearFunction"),
            ("after", "LinearFunction"),
        ]

    def test_that_measure_time(self, rng):
        scaled = wrapped_copy(Graph(self.combine))
        with chainer.function_hooks.TimerHook() as hook:
            weighted_sum(scaled(draw(rng))).backward()
        assert hook.total_time() > 0

    def test_of_links_that_standardize_weights(self, rng):
        link = Graph(lambda m, x: m.b(F.relu(m.a(x))))
        link.a.add_hook(link_hooks.WeightStandardization())
        assert_exact(link, [draw(rng)])

    def test_of_links_that_normalize_weights(self, rng):
        link = Graph(lambda m, x: m.b(F.relu(m.a(x))))
        link.a.add_hook(link_hooks.SpectralNormalization())
        link(draw(rng))
        # What it keeps is float32 by now.
        assert_exact(link, [draw(rng)], mixed16=None)

    def test_debug_mode_names_the_function_that_makes_nan(self, rng):
        class Bad(chainer.FunctionNode):
            def forward(self, inputs):
                return inputs

            def backward(self, targets, gys):
                return (chainer.Variable(gys[0].array * np.float32("nan")),)

        scaled = wrapped_copy(Graph(lambda m, x: Bad().apply((m.a(x),))[0]))
        with chainer.using_config("debug", True), pytest.raises(RuntimeError, match="NaN.*Bad"):
            weighted_sum(scaled(draw(rng))).backward()
