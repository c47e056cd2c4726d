"""`chainer.grad` through a scaled model: plain Chainer's bits in float32, true gradients in float16."""

import chainer
import chainer.functions as F
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from helpers import assert_same_bits, dtype, signal_to_noise
from twins import Graph, draw, weighted_sum, wrapped_copy

SMALL = 2.0**-24
"""What a loss counts whose true gradients float16 does not hold."""


def combine(m, x):
    m.hidden = F.tanh(m.a(x))
    return m.c(F.relu(m.b(m.hidden)) + m.hidden)


def pair():
    """A scaled model in mixed16 and the same, plain, in float32."""
    with dtype("mixed16"):
        narrow = Graph(combine)
    wide = Graph(combine)
    wide.copyparams(narrow)
    return wrapped_copy(narrow), wide


def bits(link, ask):
    """What `ask(model)` returns of a scaled copy and of the link itself, as dictionaries."""
    found = []
    for model in (wrapped_copy(link), link):
        model.cleargrads()
        arrays = ask(model)
        found.append({str(place): getattr(array, "array", array) for place, array in enumerate(arrays)})
    return found


def wanted(model, x):
    return [x, model.hidden, model.a.W, model.b.b, model.c.W]


class TestInFloat32:
    def test_gives_plain_chainers_bits(self, rng):
        data = draw(rng)

        def ask(model):
            x = chainer.Variable(data)
            loss = weighted_sum(model(x))
            return chainer.grad([loss], wanted(model, x))

        assert_same_bits(*bits(Graph(combine), ask))

    def test_of_several_outputs_with_gradients_and_something_to_add_to(self, rng):
        data, gy, gx = draw(rng), draw(rng), draw(rng)

        def ask(model):
            x = chainer.Variable(data)
            y = model(x)
            given = [chainer.Variable(gy), None]
            added = [chainer.Variable(gx), chainer.Variable(2 * gx), None, None, None]
            return chainer.grad([y, F.sum(F.sin(y))], wanted(model, x), given, added)

        assert_same_bits(*bits(Graph(combine), ask))

    @pytest.mark.parametrize("way", [{"set_grad": True}, {"retain_grad": True}])
    def test_sets_gradients_where_it_is_told_to(self, way, rng):
        data = draw(rng)

        def ask(model):
            x = chainer.Variable(data)
            y = model(x)
            found = chainer.grad([weighted_sum(y)], wanted(model, x), **way)
            return [*found, x.grad, model.hidden.grad, model.a.W.grad, y.grad]

        assert_same_bits(*bits(Graph(combine), ask))

    def test_leaves_the_gradients_of_parameters_alone(self, rng):
        data = draw(rng)

        def ask(model):
            x = chainer.Variable(data)
            loss = weighted_sum(model(x))
            loss.backward()
            chainer.grad([loss], [x])
            return [parameter.grad for parameter in (model.a.W, model.c.b)]

        assert_same_bits(*bits(Graph(combine), ask))

    def test_of_something_that_does_not_depend_is_none(self, rng):
        model, x = wrapped_copy(Graph(lambda m, x: m.b(x))), chainer.Variable(draw(rng))
        other = chainer.Variable(draw(rng))
        gx, none, nothing = chainer.grad([weighted_sum(model(x))], [x, other, model.a.W])
        assert gx is not None and none is None and nothing is None

    def test_of_an_output_itself(self, rng):
        def ask(model):
            y = model(chainer.Variable(data))
            return chainer.grad([F.sum(y), y], [y, model.c.W], [None, chainer.Variable(y.array)])

        data = draw(rng)
        assert_same_bits(*bits(Graph(combine), ask))

    @pytest.mark.parametrize("double", [False, True])
    def test_makes_a_penalty_on_the_gradient(self, double, rng):
        data = draw(rng)

        def ask(model):
            x = chainer.Variable(data)
            y = model(x)
            (gx,) = chainer.grad([F.sum(y)], [x], enable_double_backprop=double)
            loss = weighted_sum(y) + F.sum((F.sqrt(F.sum(gx**2, axis=1)) - 1) ** 2)
            loss.backward()
            return [parameter.grad for parameter in (model.a.W, model.b.W, model.c.W)]

        assert_same_bits(*bits(Graph(combine), ask))


class TestInFloat16:
    def test_gives_true_gradients_in_float32(self, rng):
        narrow, wide = pair()
        data, found = draw(rng).astype("e"), []
        for model, x in ((narrow, data), (wide, data.astype("f"))):
            x = chainer.Variable(x)
            loss = weighted_sum(model(x)) * np.float32(SMALL)
            found.append(chainer.grad([loss], wanted(model, x)))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == np.float32
            assert signal_to_noise(ours.array, theirs.array) > 40

    def test_sets_gradients_as_backward_does(self, rng):
        narrow, wide = pair()
        data, found = draw(rng).astype("e"), []
        for model, x in ((narrow, data), (wide, data.astype("f"))):
            x = chainer.Variable(x)
            loss = weighted_sum(model(x))
            chainer.grad([loss], wanted(model, x), set_grad=True)
            found.append([v.grad for v in wanted(model, x)])
            assert [v.grad.dtype for v in (x, model.hidden)] == [x.dtype] * 2
        assert found[0][2].dtype == np.float32
        for ours, theirs in zip(*found, strict=True):
            assert signal_to_noise(ours, theirs) > 40

    def test_inside_a_hook_gives_true_gradients_too(self, rng):
        class Asking(chainer.FunctionHook):
            found = None

            def backward_postprocess(self, function, in_data, gys):
                if function.label == "Tanh" and self.found is None:
                    (self.found,) = chainer.grad([loss], [model.c.W])

        narrow, wide = pair()
        data, found = draw(rng).astype("e"), []
        for model, x in ((narrow, data), (wide, data.astype("f"))):
            loss = weighted_sum(model(x)) * np.float32(SMALL)
            with Asking() as hook:
                loss.backward()
            found.append(hook.found.array)
        assert found[0].dtype == np.float32
        assert signal_to_noise(*found) > 40

    @pytest.mark.parametrize("by_grad", [True, False])
    def test_to_be_differentiated_again_is_chainers_with_a_warning(self, by_grad, rng):
        with dtype("mixed16"):
            model = AdaLossScaled(Graph(combine))
        x = chainer.Variable(draw(rng).astype("e"))
        loss = F.sum(model(x))
        with pytest.warns(UserWarning, match="differentiated again"):
            if by_grad:
                chainer.grad([loss], [x], enable_double_backprop=True)
            else:
                loss.backward(enable_double_backprop=True)


def test_a_graph_without_a_scope_is_left_to_chainer(rng, monkeypatch):
    from ada_loss.chainer import grad

    monkeypatch.setattr(grad, "PartialPass", None)
    link, x = Graph(combine), chainer.Variable(draw(rng))
    (gx,) = chainer.grad([weighted_sum(link(x))], [x])
    assert gx is not None
    with pytest.raises(TypeError):
        chainer.grad([weighted_sum(wrapped_copy(link)(x))], [x])
