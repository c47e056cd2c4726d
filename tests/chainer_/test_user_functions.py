"""Functions of the user's own: right whatever their backward does, or refused by name in float16."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, linear_backward
from ada_loss.chainer.user_functions import is_users
from helpers import dtype, signal_to_noise
from twins import Graph, assert_exact, draw, exact, gradients, weighted_sum, wrapped_copy
from user_code import WAYS, WRITES, Again, AgainInOldStyle, ByHand, Changing, again, by_backward, changing

SMALL = 2.0**-18
"""What a loss counts whose true gradients float16 does not hold."""


def clipped(threshold):
    return lambda gy: np.clip(gy, -threshold, threshold)


def norm_clipped(threshold):
    return lambda gy: gy * min(1, threshold / np.linalg.norm(gy.astype("f")))


def noisy(scale):
    return lambda gy: gy + scale * np.random.standard_normal(gy.shape)


def shrunk(threshold):
    return lambda gy: np.sign(gy) * np.maximum(abs(gy) - threshold, 0)


NOT_LINEAR = {
    "clips": clipped(1e-7),
    "clips to a norm": norm_clipped(1e-7),
    "normalizes": lambda gy: gy / np.linalg.norm(gy.astype("f")),
    "takes the sign": np.sign,
    "adds noise": noisy(1e-4),
    "adds a penalty": lambda gy: gy + 1e-4,
    "leaves small ones out": shrunk(1e-5),
    "squares": lambda gy: gy * abs(gy),
}

LINEAR = {
    "passes it on": lambda gy: gy,
    "reverses it": lambda gy: -gy,
    "scales it": lambda gy: 0.3 * gy,
    "leaves nothing": np.zeros_like,
    "masks it": lambda gy: gy * (np.arange(gy.size).reshape(gy.shape) % 3 > 0),
    "drops at random": lambda gy: gy * (np.random.random(gy.shape) < 0.7),
    "mixes rows": lambda gy: gy[::-1] - gy.mean(axis=0, dtype="f"),
    "makes it much smaller": lambda gy: gy * 1e-3,
    "changes it in place": lambda gy: np.multiply(gy, 2, out=gy),
}


class TestPassesInsideABackward:
    @pytest.mark.parametrize("go_back", WAYS)
    def test_give_parameters_true_gradients(self, go_back, rng):
        def combine(m, x):
            return m.c(again(lambda h: F.tanh(m.b(h)), F.tanh(m.a(x)), go_back=go_back))

        exact(rng, combine)

    @pytest.mark.parametrize("go_back", WAYS)
    def test_of_old_style_functions_too(self, go_back, rng):
        def combine(m, x):
            return m.c(AgainInOldStyle(lambda h: F.tanh(m.b(h)), go_back)(F.tanh(m.a(x))))

        exact(rng, combine)

    def test_inside_each_other(self, rng):
        def inner(m, h):
            return F.tanh(m.b(h))

        exact(rng, lambda m, x: m.c(again(lambda h: again(lambda k: inner(m, k), F.relu(h)), m.a(x))))

    def test_of_several_inputs(self, rng):
        exact(rng, lambda m, x, y: m.c(again(lambda h, k: m.b(h) * F.sin(k), m.a(x), y)), inputs=2)

    def test_with_f_forget_inside_and_around(self, rng):
        def combine(m, x):
            h = again(lambda h: F.forget(lambda k: F.tanh(m.b(k)), h), m.a(x))
            return F.forget(lambda h: again(lambda k: F.tanh(m.c(k)), h), h)

        exact(rng, combine)

    def test_in_which_a_layer_is_used_several_times(self, rng):
        exact(rng, lambda m, x: m.c(again(lambda h: F.tanh(m.b(F.tanh(m.b(h)))), m.a(x))))

    def test_by_chainer_grad_hand_on_a_gradient_only(self, rng):
        class ByGrad(Again):
            def backward(self, targets, gys):
                x = chainer.Variable(self.get_retained_inputs()[0].array)
                with chainer.force_backprop_mode():
                    y = self.f(x)
                return tuple(chainer.grad([y], [x], grad_outputs=gys))

        exact(rng, lambda m, x: m.c(ByGrad(lambda h: F.tanh(F.sin(h))).apply((m.a(x),))[0]))

    @pytest.mark.parametrize("scale", [2.0**7, 3.0])
    def test_carry_the_loss_scale_around(self, scale, rng):
        link = Graph(lambda m, x: m.c(again(lambda h: F.tanh(m.b(h)), F.tanh(m.a(x)))))
        x = draw(rng)
        _, expected = gradients(link, lambda model, x: weighted_sum(model(x)), [x])
        scaled = wrapped_copy(link)
        scaled.cleargrads()
        weighted_sum(scaled(x)).backward(loss_scale=scale)
        for path, gradient in scaled.true_gradients().items():
            np.testing.assert_allclose(gradient, expected[path], rtol=1e-5, atol=1e-7, err_msg=path)

    def test_drop_and_normalize_as_before(self, rng):
        class Net(chainer.Chain):
            def __init__(self):
                super().__init__(a=L.Linear(4, 4), bn=L.BatchNormalization(4), b=L.Linear(4, 4))

            def forward(self, x):
                block = lambda h: F.sin(self.b(self.bn(h)))  # noqa: E731
                return again(block, self.a(x))

        link = Net()
        scaled = assert_exact(link, [draw(rng, 6, 4)])
        np.testing.assert_array_equal(scaled.bn.avg_mean, link.bn.avg_mean)
        np.testing.assert_array_equal(scaled.bn.avg_var, link.bn.avg_var)

    @pytest.mark.parametrize("precision", ["float32", "mixed16"])
    def test_give_leaves_outside_true_gradients(self, precision, rng):
        with dtype(precision):
            link = Graph(lambda m, x, z: m.c(again(lambda h: m.b(h) * F.sin(z), m.a(x))))
        kind = link.a.W.dtype
        x, z = draw(rng).astype(kind), chainer.Variable(draw(rng).astype(kind))
        wide = Graph(lambda m, x, z: m.c(m.b(m.a(x)) * F.sin(z)))
        wide.copyparams(link)
        w = chainer.Variable(z.array.astype("f"))
        for _ in range(2):
            weighted_sum(wrapped_copy(link)(x, z)).backward()
            weighted_sum(wide(x.astype("f"), w)).backward()
        assert signal_to_noise(z.grad, w.grad) > 40

    def test_give_leaves_outside_true_gradients_from_float32_inside_float16(self, rng):
        def inner(z):
            return lambda h: F.sin(h) * F.cast(F.sin(z), "f")

        def outer(m, z, mixed):
            def block(h):
                if not mixed:
                    return m.b(F.sin(h) * F.sin(z))
                return m.b(F.cast(again(inner(z), F.cast(h, "f")), "e"))

            return block

        with dtype("mixed16"):
            link = Graph(lambda m, x, z: m.c(again(outer(m, z, True), m.a(x))))
        wide = Graph(lambda m, x, z: m.c(outer(m, z, False)(m.a(x))))
        wide.copyparams(link)
        x, z = draw(rng).astype("e"), chainer.Variable(draw(rng).astype("e"))
        w = chainer.Variable(z.array.astype("f"))
        weighted_sum(wrapped_copy(link)(x, z)).backward()
        weighted_sum(wide(x.astype("f"), w)).backward()
        assert signal_to_noise(z.grad, w.grad) > 40

    def test_draw_the_same_random_numbers_however_often_they_are_computed(self, rng):
        with dtype("mixed16"):
            link = Graph(lambda m, x: m.c(again(lambda h: F.tanh(m.b(h)), F.dropout(m.a(x), 0.3))))
        scaled = wrapped_copy(link)
        np.random.seed(0)
        loss = weighted_sum(scaled(draw(rng).astype("e"))) * np.float32(SMALL)
        before = np.random.get_state()[2]
        loss.backward()
        assert np.random.get_state()[2] == before

    def test_that_start_from_something_else_are_refused_in_float16(self, rng):
        def with_a_penalty(y, gy):
            by_backward(y, gy)
            with chainer.force_backprop_mode():
                penalty = F.sum(y * y)
            penalty.backward()

        refused(rng, lambda m, x: again(lambda h: F.tanh(m.b(h)), m.a(x), go_back=with_a_penalty), "Again")

    def test_that_start_from_something_else_are_right_in_float32(self, rng):
        def with_a_penalty(y, gy):
            by_backward(y, gy)
            with chainer.force_backprop_mode():
                penalty = F.sum(y * y)
            penalty.backward()

        exact(
            rng,
            lambda m, x: again(lambda h: F.tanh(m.b(h)), m.a(x), go_back=with_a_penalty),
            mixed16=None,
        )


class TestGradientsWrittenInABackward:
    @pytest.mark.parametrize("write", WRITES)
    def test_are_true_afterwards(self, write, rng):
        exact(rng, lambda m, x: m.c(ByHand(m.b.W, write).apply((m.a(x),))[0]))

    @pytest.mark.parametrize("write", WRITES)
    def test_add_up_over_uses_and_passes(self, write, rng):
        first = draw(rng)

        def combine(m, x):
            h = ByHand(m.b.W, write).apply((m.a(x),))[0]
            return m.c(ByHand(m.b.W, write).apply((F.tanh(h),))[0])

        def run(model, x):
            weighted_sum(model(first.astype(x.dtype))).backward()
            return weighted_sum(model(x))

        exact(rng, combine, run, mixed16=1)

    @pytest.mark.parametrize("write", WRITES)
    def test_of_parameters_outside_every_scaled_model_are_true_too(self, write, rng):
        with dtype("mixed16"):
            scaled, head = AdaLossScaled(Graph(lambda m, x: m.a(x)), output_dtype=None), L.Linear(4, 4)
        wide, wide_head = Graph(lambda m, x: m.a(x)), L.Linear(4, 4)
        wide.copyparams(scaled)
        wide_head.copyparams(head)
        x = draw(rng).astype("e")
        for model, last, data in ((scaled, head, x), (wide, wide_head, x.astype("f"))):
            model.cleargrads()
            last.cleargrads()
            for _ in range(2):
                y = ByHand(last.W, write).apply((F.tanh(model(data)),))[0]
                (weighted_sum(y) * np.float32(SMALL)).backward()
        assert signal_to_noise(head.W.grad, wide_head.W.grad) > 40
        assert signal_to_noise(scaled.a.W.grad, wide.a.W.grad) > 40
        chainer.optimizers.SGD(0.1 / SMALL).setup(head).update()
        chainer.optimizers.SGD(0.1 / SMALL).setup(wide_head).update()
        np.testing.assert_allclose(head.W.array, wide_head.W.array, atol=5e-3)

    def test_of_a_reversible_block(self, rng):
        class Reversible(chainer.FunctionNode):
            def __init__(self, f, g):
                self.f, self.g = f, g

            def forward(self, inputs):
                x1, x2 = inputs
                with chainer.no_backprop_mode():
                    y1 = x1 + self.f(chainer.Variable(x2)).array
                    y2 = x2 + self.g(chainer.Variable(y1)).array
                self.retain_outputs((0, 1))
                return y1, y2

            def backward(self, targets, gys):
                y1, y2 = (y.array for y in self.get_retained_outputs())
                gy1, gy2 = (gy.array for gy in gys)
                with chainer.force_backprop_mode():
                    z1 = chainer.Variable(y1)
                    gz = self.g(z1)
                gz.grad = gy2
                gz.backward()
                x2 = chainer.Variable(y2 - gz.array)
                gx1 = gy1 + z1.grad
                with chainer.force_backprop_mode():
                    fx = self.f(x2)
                fx.grad = gx1
                fx.backward()
                return chainer.Variable(gx1), chainer.Variable(gy2 + x2.grad)

        def combine(m, x):
            return Reversible(lambda h: F.tanh(m.b(h)), lambda h: F.tanh(m.c(h))).apply((m.a(x), F.sin(x)))

        exact(rng, combine)


# Gradients that a function makes tiny are none that float16 holds, at the input.
@pytest.mark.filterwarnings("ignore:The gradient of an input underflows")
class TestChangedGradients:
    @pytest.mark.parametrize("kind", LINEAR)
    def test_that_are_linear_are_right(self, kind, rng):
        exact(rng, lambda m, x: m.b(changing(LINEAR[kind], m.a(x))))

    @pytest.mark.parametrize("kind", NOT_LINEAR)
    def test_that_are_not_are_right_in_float32(self, kind, rng):
        exact(rng, lambda m, x: m.b(changing(NOT_LINEAR[kind], m.a(x))), mixed16=None)

    @pytest.mark.parametrize("kind", NOT_LINEAR)
    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.filterwarnings("ignore:overflow encountered")
    def test_that_are_not_are_refused_where_float16_loses_the_true_one(self, kind, inside, rng):
        change = NOT_LINEAR[kind]
        if inside:
            refused(rng, lambda m, x: m.b(changing(change, m.a(x))), "Changing")
        else:
            refused(rng, lambda m, x: m.a(x), "Changing", lambda y: changing(change, y), output_dtype=None)

    @pytest.mark.parametrize("threshold", [0.05, 0.2])
    def test_that_are_not_are_right_where_float16_holds_the_true_one(self, threshold, rng):
        # With a loss of ordinary size.
        exact(rng, lambda m, x: m.b(changing(clipped(threshold), m.a(x))), mixed16=1)

    def test_of_an_old_style_function_are_refused_by_its_name(self, rng):
        class Clip(chainer.Function):
            def forward(self, inputs):
                return inputs

            def backward(self, inputs, gys):
                return (np.clip(gys[0], -1e-7, 1e-7).astype(gys[0].dtype),)

        refused(rng, lambda m, x: m.b(Clip()(m.a(x))), "Clip")

    def test_between_formats_are_right(self, rng):
        class Widened(chainer.FunctionNode):
            """Its input in float32; its gradient in the dtype of the input."""

            def forward(self, inputs):
                self.kind = inputs[0].dtype
                return (inputs[0].astype("f"),)

            def backward(self, targets, gys):
                return (chainer.Variable((1e-3 * gys[0].array).astype(self.kind)),)

        exact(rng, lambda m, x: Widened().apply((m.a(m.b(x)),))[0])

    def test_in_a_function_that_cannot_be_computed_twice_are_refused(self, rng):
        class Once(Changing):
            def backward(self, targets, gys):
                change, self.change = self.change, None
                return (chainer.Variable(change(gys[0].array)),)

        refused(rng, lambda m, x: m.b(Once(lambda gy: gy).apply((m.a(x),))[0]), "Once.backward cannot")

    def test_of_a_declared_function_are_computed_once(self, rng):
        @linear_backward
        class Declared(Changing):
            def backward(self, targets, gys):
                self.calls += 1
                return (chainer.Variable(self.change(gys[0].array)),)

        class Derived(Declared):
            def backward(self, targets, gys):
                self.calls += 1
                return (chainer.Variable(self.change(gys[0].array)),)

        for cls, once in ((Declared, True), (Derived, False)):
            node = cls(lambda gy: -gy)
            narrow(rng, lambda m, x, node=node: m.b(node.apply((m.a(x),))[0]))
            assert (node.calls == 1) == once

    def test_of_a_declared_function_inherit_the_exponent(self, rng):
        @linear_backward
        class Declared(Again):
            def backward(self, targets, gys):
                return super().backward(targets, gys)

        exact(rng, lambda m, x: m.c(Declared(lambda h: F.tanh(m.b(h))).apply((F.tanh(m.a(x)),))[0]))

    @pytest.mark.parametrize("change", [clipped, norm_clipped, shrunk, "add", "leave out"])
    @pytest.mark.parametrize("threshold", 1.4 * 2.0 ** np.arange(-17, 3, 4))
    @pytest.mark.parametrize("factor", [2.0**-24, 2.0**-12, 1])
    def test_by_any_threshold_are_right_or_refused(self, change, threshold, factor, rng):
        if change == "add":
            changed = lambda gy: gy + threshold  # noqa: E731
        elif change == "leave out":
            changed = lambda gy: gy * (abs(gy) > threshold)  # noqa: E731
        else:
            changed = change(threshold)
        combine = lambda m, x: m.b(changing(changed, m.a(x)))  # noqa: E731
        with dtype("mixed16"):
            narrow_one = AdaLossScaled(Graph(combine))
        wide = Graph(combine)
        wide.copyparams(narrow_one)
        x, found = draw(rng).astype("e"), []
        for model, data in ((wide, x.astype("f")), (narrow_one, x)):
            model.cleargrads()
            loss = weighted_sum(model(data)) * np.float32(factor)
            try:
                loss.backward()
            except RuntimeError as error:
                assert "Changing.backward is not linear" in str(error)
                return
            found.append(model.a.W.grad)
        assert signal_to_noise(*found[::-1]) > 25

    def test_of_zeros_are_true(self, rng):
        # A penalty is not scaled along with a gradient of nothing.
        def combine(m, x):
            return m.b(changing(lambda gy: gy + 0.25, m.a(x))) * 0

        exact(rng, combine, mixed16=1)


def test_a_function_is_the_users_if_its_backward_is():
    class OwnForward(chainer.functions.math.basic_math.Add):
        def forward(self, inputs):
            return super().forward(inputs)

    class OwnBackward(OwnForward):
        def backward(self, targets, gys):
            return gys * 2

    assert not is_users(chainer.functions.math.basic_math.Add())
    assert not is_users(OwnForward())
    assert is_users(OwnBackward())
    assert is_users(Again(F.sin))
    assert is_users(AgainInOldStyle(F.sin).node)
    patched = OwnForward()
    patched.backward = lambda targets, gys: gys * 2
    assert is_users(patched)


def narrow(rng, combine, after=lambda y: y, **settings):
    """A backward pass through a mixed16 model whose true gradients float16 does not hold."""
    with dtype("mixed16"):
        scaled = AdaLossScaled(Graph(combine), **settings)
    scaled.cleargrads()
    y = after(scaled(draw(rng).astype("e")))
    (weighted_sum(y) * np.float32(SMALL)).backward()
    return scaled


def refused(rng, combine, name, after=lambda y: y, **settings):
    with pytest.raises(RuntimeError, match=name):
        narrow(rng, combine, after, **settings)
