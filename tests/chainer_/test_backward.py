"""The engine: in float32 a scope's gradients are plain Chainer's, bit for bit, whatever the graph."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from ada_loss.chainer import AdaLossScaled
from ada_loss.config import TIMINGS
from helpers import assert_same_bits, dtype, signal_to_noise
from twins import assert_exact, gradients, weighted_sum, wrapped_copy


class Graph(chainer.Chain):
    """Three layers, combined by a function of them and of inputs."""

    def __init__(self, combine, size=4):
        super().__init__(a=L.Linear(size, size), b=L.Linear(size, size), c=L.Linear(size, size))
        self.combine = combine

    def forward(self, *xs):
        return self.combine(self, *xs)


def draw(rng, *shape):
    return rng.standard_normal(shape or (3, 4)).astype(np.float32)


def wide(x):
    """What Chainer can add to a scope's results."""
    return F.cast(x, np.float32)


def exact(rng, combine, run=None, inputs=1, **keywords):
    return assert_exact(Graph(combine), [draw(rng) for _ in range(inputs)], run, **keywords)


class TestGraphs:
    def test_skip_connections(self, rng):
        def combine(m, x):
            h = F.relu(m.a(x))
            return m.c(h + m.b(h)) + h + x

        scaled = exact(rng, combine, decisions=3)
        assert len({decision.exponent for decision in scaled.decisions}) > 1

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
        assert not any(decision.shift for decision in scaled.decisions)

    def test_gradients_of_zeros(self, rng):
        scaled = exact(rng, lambda m, x: m.b(F.relu(m.a(x))) * 0, decisions=2)
        assert not any(decision.shift for decision in scaled.decisions)

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
        assert scaled.link.c.W.grad is None

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
            link = model.link if isinstance(model, AdaLossScaled) else model
            return weighted_sum(model(x)) + 0.5 * wide(F.sum(link.a.W**2)) + wide(F.sum(link.b(x) * 3))

        exact(rng, lambda m, x: m.b(F.relu(m.a(x))), run, mixed16=1)

    def test_of_a_pass_through_the_scope_and_a_plain_one(self, rng):
        data = draw(rng)

        def run(model, x):
            link = model.link if isinstance(model, AdaLossScaled) else model
            weighted_sum(model(data.astype(x.dtype))).backward()
            return weighted_sum(link.a(x))

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
    class Noting(chainer.FunctionHook):
        """Notes the functions that it is called for, and what it is given."""

        name = "Noting"

        def __init__(self):
            self.calls = []

        def backward_preprocess(self, function, in_data, gys):
            self.calls.append(
                ("before", function.label, len(in_data), [gy.shape for gy in gys if gy is not None])
            )

        def backward_postprocess(self, function, in_data, gys):
            self.calls.append(
                ("after", function.label, len(in_data), [gy.shape for gy in gys if gy is not None])
            )

    def combine(self, m, x):
        h = F.relu(m.a(x))
        return m.b(h) + m.c(h)

    def test_of_functions_are_called_as_chainer_calls_them(self, rng):
        link, notes = Graph(self.combine), []
        for model in (link, wrapped_copy(link)):
            with self.Noting() as hook:
                weighted_sum(model(draw(rng))).backward()
            notes.append(hook.calls)
        assert notes[1] == notes[0]

    def test_of_one_function_are_called(self, rng):
        hook = self.Noting()

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


class TestForget:
    def forgetting(self, m, x):
        return F.forget(lambda h: m.b(F.relu(m.a(h))), x) + m.c(x)

    def test_inside_a_scope(self, rng):
        scaled = exact(rng, self.forgetting, decisions=3)
        assert {d.site.path for d in scaled.decisions} == {"/a", "/b", "/c"}

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
    def test_gradients_are_right_where_a_forgotten_layer_shares_a_site(self, interval, timing, rng):
        # Gradients are cleared between forward and backward, as optimizers do it. The count of calls starts
        # anew then, so that the layer has the site of its first use as it is recomputed. Between updates, or
        # with delayed timing, it has the shift of the other: one that may be worse than its own, but is
        # divided out all the same.
        def combine(m, x):
            return F.forget(lambda h: 0.001 * m.a(h), F.tanh(m.a(x))) + x

        link = Graph(combine)
        reference = Graph(lambda m, x: 0.001 * m.a(F.tanh(m.a(x))) + x)
        reference.copyparams(link)
        scaled = wrapped_copy(link, update_per_n_iteration=interval, timing=timing)
        for _ in range(3):
            x = draw(rng)
            for model in (scaled, reference):
                loss = weighted_sum(model(x))
                model.cleargrads()
                loss.backward()
            assert {decision.site.call for decision in scaled.decisions} == {0}
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


class TestOtherWaysToDifferentiate:
    def combine(self, m, x):
        m.kept = F.relu(m.a(x))
        return m.b(m.kept) + m.c(x)

    @pytest.mark.parametrize("of", ["inputs", "parameters", "kept"])
    def test_chainer_grad(self, of, rng):
        link = Graph(self.combine)
        found = []
        for model in (link, wrapped_copy(link)):
            x = chainer.Variable(draw(np.random.default_rng(5)))
            loss = weighted_sum(model(F.sin(x)))
            parameters = [parameter for _, parameter in sorted(model.namedparams())]
            wanted = {"inputs": [x], "parameters": parameters, "kept": [model.kept]}[of]
            found.append([g.array for g in chainer.grad([loss], wanted)])
        for ours, plain in zip(*found, strict=True):
            np.testing.assert_array_equal(ours, plain)

    def test_chainer_backward_from_several_losses(self, rng):
        def run(model, x):
            y, z = model(x), model(F.sin(x))
            y.grad, z.grad = np.ones_like(y.array), np.full_like(z.array, 0.25)
            chainer.backward([y, z])
            return weighted_sum(model(x))

        exact(rng, self.combine, run, mixed16=1)

    def test_chainer_grad_in_mixed16_is_chainers_without_a_scale(self, rng):
        with dtype("mixed16"):
            link = Graph(self.combine)
        found = []
        for model in (link, wrapped_copy(link, output_dtype=None)):
            x = chainer.Variable(draw(np.random.default_rng(5)).astype(np.float16))
            found.append([g.array for g in chainer.grad([weighted_sum(model(x))], [x, model.a.W])])
        for ours, plain in zip(*found, strict=True):
            np.testing.assert_array_equal(ours, plain)

    def test_differentiating_twice_is_chainers(self, rng):
        link = Graph(lambda m, x: m.b(F.tanh(m.a(x))))
        found = []
        for model in (link, wrapped_copy(link)):
            x = chainer.Variable(draw(np.random.default_rng(5)))
            loss = F.sum(model(x) ** 2)
            (gx,) = chainer.grad([loss], [x], enable_double_backprop=True)
            model.cleargrads()
            (loss + F.sum(gx**2)).backward()
            found.append({path: parameter.grad for path, parameter in model.namedparams() if path[1] != "c"})
        assert_same_bits(*found)

    def test_a_penalty_on_the_gradients_of_parameters(self, rng):
        link = Graph(lambda m, x: m.b(F.tanh(m.a(x))))
        found = []
        for model in (link, wrapped_copy(link)):
            model.cleargrads()
            F.sum(model(draw(np.random.default_rng(5))) ** 2).backward(enable_double_backprop=True)
            used = [parameter for path, parameter in sorted(model.namedparams()) if path[1] != "c"]
            penalty = sum(F.sum(parameter.grad_var**2) for parameter in used)
            model.cleargrads()
            penalty.backward()
            found.append({path: parameter.grad for path, parameter in model.namedparams()})
        assert_same_bits(*found)

    def test_differentiating_twice_with_a_loss_scale_is_an_error(self, rng):
        scaled = wrapped_copy(Graph(self.combine))
        loss = weighted_sum(scaled(draw(rng)))
        with pytest.raises(RuntimeError, match="AdaLossScaled takes no loss scale"):
            loss.backward(enable_double_backprop=True, loss_scale=8)

    def test_a_backward_pass_inside_the_link(self, rng):
        # As adversarial training does: the gradient of the input makes the input of a second pass.
        def combine(m, x):
            probe = chainer.Variable(x.array)
            F.sum(F.forget(m.a, probe) ** 2).backward()
            m.cleargrads()
            return m.b(F.relu(m.a(x.array + 0.1 * np.sign(probe.grad))))

        exact(rng, combine)

    def test_the_gradient_of_an_input_inside_the_link(self, rng):
        def combine(m, x):
            h = m.a(x)
            (gx,) = chainer.grad([F.sum(F.tanh(h))], [x], enable_double_backprop=True)
            return m.b(h * gx)

        exact(rng, combine, lambda model, x: weighted_sum(model(F.sin(x))))


class TestBoundary:
    @pytest.mark.parametrize("scale", [2.0**10, 3.0])
    def test_a_loss_scale_is_in_the_gradient_of_inputs_and_not_of_parameters(self, scale, rng):
        link, x = Graph(lambda m, x: m.b(F.relu(m.a(x)))), chainer.Variable(draw(rng))
        expected = gradients(link, lambda model, x: weighted_sum(model(x)), [x.array])[1]
        scaled = wrapped_copy(link)
        scaled.cleargrads()
        weighted_sum(scaled(x)).backward(loss_scale=scale)
        np.testing.assert_allclose(x.grad, scale * expected["input 0"], rtol=1e-5)
        for path, gradient in scaled.true_gradients().items():
            if expected[path] is not None:
                np.testing.assert_allclose(gradient, expected[path], rtol=1e-5, atol=1e-7)

    def test_float16_inputs_get_true_gradients(self, rng):
        with dtype("float16"):
            link = Graph(lambda m, x: m.b(F.tanh(m.a(x))))
        x = chainer.Variable(draw(rng).astype(np.float16))
        scaled = wrapped_copy(link)
        scaled.cleargrads()
        F.sum(scaled(x) * 3).backward()
        wide = Graph(link.combine)
        wide.copyparams(link)
        z = chainer.Variable(x.array.astype(np.float32))
        F.sum(wide(z) * 3).backward()
        assert x.grad.dtype == np.float16
        assert signal_to_noise(x.grad, z.grad) > 50

    def test_scales_save_gradients_that_underflow_without(self, rng):
        with dtype("mixed16"):
            link = Graph(lambda m, x: m.c(F.tanh(m.b(F.tanh(m.a(x))))))
        x = draw(rng).astype(np.float16)
        wide = Graph(link.combine)
        wide.copyparams(link)
        expected = gradients(wide, lambda model, x: weighted_sum(model(x)), [x.astype(np.float32)])[1]
        ratios = {}
        for method in ("fixed", "auto"):
            scaled = wrapped_copy(link, loss_scale_method=method)
            scaled.cleargrads()
            (weighted_sum(scaled(x)) * 2.0**-24).backward()
            found = scaled.true_gradients()
            ratios[method] = min(
                signal_to_noise(np.ldexp(g, 24), expected[path]) for path, g in found.items()
            )
        assert ratios["fixed"] < 10 < 45 < ratios["auto"]

    @pytest.mark.parametrize("step", ["weight", "bias", "broadcast"])
    def test_auto_lets_no_sum_over_a_batch_overflow(self, step, rng):
        # Gradients of 64 and less, as the rule aims for, whose sums are beyond float16.
        def combine(m, x):
            h = F.broadcast_to(m.a(x), (4000, 4)) if step == "broadcast" else m.a(x)
            return F.linear(h, m.b.W * 0 + 1, m.b.b) if step == "bias" else h

        with dtype("float16"):
            link = Graph(combine)
        rows, size = (1, 1) if step == "broadcast" else (4000, 50 if step == "weight" else 1)
        x = (size * (1 + rng.uniform(0, 1, (rows, 4)))).astype(np.float16)
        found = {}
        for method in ("auto", "fixed"):
            scaled = wrapped_copy(link, loss_scale_method=method, init_scale=64)
            scaled.cleargrads()
            F.sum(scaled(x)).backward()
            found[method] = {path: g for path, g in scaled.true_gradients().items() if g is not None}
        wide = Graph(combine)
        wide.copyparams(link)
        expected = gradients(wide, lambda model, x: F.sum(model(x)), [x.astype(np.float32)])[1]
        assert not all(np.isfinite(gradient).all() for gradient in found["fixed"].values())
        for path, gradient in found["auto"].items():
            if expected[path].any():
                assert signal_to_noise(gradient, expected[path]) > 50, path

    @pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
    def test_auto_computes_sums_that_overflow_again_for_any_results_that_are_used(self, used, rng):
        class Spread(chainer.FunctionNode):
            """Its input for many rows, and its double."""

            def forward(self, inputs):
                (x,) = inputs
                return np.repeat(x, 4000, axis=0), np.repeat(2 * x, 4000, axis=0)

            def backward(self, targets, gys):
                sums = [n * F.sum(gy, axis=0, keepdims=True) for n, gy in enumerate(gys, 1) if gy is not None]
                return (sum(sums),)

        def combine(m, x):
            results = Spread().apply((F.tanh(m.a(x)),))
            return [results[place] for place in used]

        with dtype("float16"):
            link = Graph(combine)
        wide = Graph(combine)
        wide.copyparams(link)
        x = draw(rng, 1, 4).astype(np.float16)
        scaled = wrapped_copy(link, init_scale=64)
        scaled.cleargrads()
        with TestHooks.Noting() as hook:
            sum(F.sum(y) for y in scaled(x)).backward()
        expected = gradients(wide, lambda model, x: sum(F.sum(y) for y in model(x)), [x.astype(np.float32)])[
            1
        ]
        assert signal_to_noise(scaled.a.W.grad, expected["/a/W"]) > 45
        # Hooks are called once for each function all the same.
        calls = [call[:2] for call in hook.calls]
        assert calls.count(("before", "Spread")) == calls.count(("after", "Spread")) == 1

    def test_an_overflow_stays_visible(self, rng):
        with dtype("mixed16"):
            link = Graph(lambda m, x: m.b(F.tanh(m.a(x))))
        scaled = wrapped_copy(link, loss_scale_method="fixed")
        scaled.cleargrads()
        (weighted_sum(scaled(draw(rng).astype(np.float16))) * 2.0**40).backward()
        assert not np.isfinite(scaled.link.a.W.grad).all()

    def test_graphs_without_a_scope_are_left_to_chainers_engine(self, rng, monkeypatch):
        from ada_loss.chainer import backward

        monkeypatch.setattr(backward, "BackwardPass", None)
        link = Graph(lambda m, x: m.b(F.forget(m.a, x)))
        x = chainer.Variable(draw(rng))
        weighted_sum(link(x)).backward()
        assert x.grad is not None
        with pytest.raises(TypeError):
            weighted_sum(wrapped_copy(link)(x)).backward()

    def test_functions_that_send_gradients_to_other_processes_are_named(self, rng):
        chainermn = pytest.importorskip("chainermn")
        pytest.importorskip("mpi4py")
        communicator = chainermn.create_communicator("naive")
        scaled = wrapped_copy(Graph(lambda m, x: m.b(chainermn.functions.bcast(communicator, m.a(x)))))
        with pytest.raises(RuntimeError, match="Bcast.*outside AdaLossScaled"):
            weighted_sum(scaled(draw(rng))).backward()

    def test_a_function_that_averages_over_processes_is_not_computed_again(self, rng, monkeypatch):
        # Where a sum overflows in one process only, the others would not take part in a second average.
        chainermn = pytest.importorskip("chainermn")
        pytest.importorskip("mpi4py")
        communicator, averaged = chainermn.create_communicator("naive"), []
        with dtype("float16"):
            norm = chainermn.links.MultiNodeBatchNormalization(4, communicator)
            link = Graph(lambda m, x: norm(m.a(x)))
        norm.gamma.array = norm.gamma.array.astype(np.float16)
        scaled = wrapped_copy(link)
        y = scaled(draw(rng, 2000, 4).astype(np.float16))
        monkeypatch.setattr(communicator, "_multi_node_mean", lambda *_: averaged.append(1))
        F.sum(y).backward()
        assert averaged == [1]
