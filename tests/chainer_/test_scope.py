"""Scopes: what goes in and comes out, and several of them."""

import collections

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from helpers import dtype, signal_to_noise
from twins import Two, assert_exact, draw, gradients, weighted_sum, wrapped_copy

Pair = collections.namedtuple("Pair", "first second")


class TestArguments:
    @pytest.mark.parametrize(
        "call",
        [
            lambda model, x, y: model(x, other=y),
            lambda model, x, y: model(**{"x": x, "other": [y, x]}),
            lambda model, x, y: model([x, (y, None)]),
            lambda model, x, y: model({"left": x, "right": {"deep": [y]}}, 7),
            lambda model, x, y: model(Pair(x, y), other="text"),
        ],
    )
    def test_may_be_nested_and_have_names(self, call, rng):
        def variables(value):
            if isinstance(value, chainer.Variable):
                yield value
            elif isinstance(value, list | tuple | dict):
                for item in value.values() if isinstance(value, dict) else value:
                    yield from variables(item)

        def compute(m, x, number=None, other=None):
            first, *rest = variables([x, other])
            return m.b(F.relu(m.a(first)) + sum(rest))

        assert_exact(
            Two(compute), [draw(rng), draw(rng)], lambda *args: weighted_sum(call(*args)), decisions=2
        )

    def test_may_be_parameters(self, rng):
        def run(model, x):
            return weighted_sum(model(model.b.W)) + weighted_sum(model(x))

        assert_exact(Two(lambda m, x: m.a(F.sin(x))), [draw(rng)], run)

    def test_may_be_something_that_holds_variables(self, rng):
        class Batch:
            def __init__(self, x):
                self.x = x

        run = lambda model, x: weighted_sum(model(Batch(x)))  # noqa: E731
        assert_exact(Two(lambda m, batch: m.b(F.relu(m.a(batch.x)))), [draw(rng)], run, decisions=2)


class TestResults:
    @pytest.mark.parametrize(
        ("arrange", "select"),
        [
            (lambda p, q: (p, q), lambda r: [r[0], r[1]]),
            (lambda p, q: [p, [q, None, 3]], lambda r: [r[0], r[1][0]]),
            (lambda p, q: {"p": p, "q": {"q": (q,)}}, lambda r: [r["p"], r["q"]["q"][0]]),
            (lambda p, q: collections.OrderedDict(p=p, q=q), lambda r: [r["p"], r["q"]]),
            (lambda p, q: Pair(p, second=q), lambda r: [r.first, r.second]),
            (lambda p, q: (q, "text", p.array), lambda r: [r[0]]),
        ],
    )
    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_keep_their_structure(self, arrange, select, precision, rng):
        with dtype(precision):
            link = Two(lambda m, x: arrange(m.a(x), F.sin(m.b(x))))
        x = draw(rng).astype(precision)
        scaled = wrapped_copy(link)
        ours, plain = scaled(x), link(x)
        assert type(ours) is type(plain)
        for one, other in zip(select(ours), select(plain), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one.array, other.array)
        scaled.cleargrads()
        weighted_sum(select(ours)).backward()
        assert scaled.b.W.grad is not None

    def test_are_the_very_objects_where_nothing_is_cast(self, rng):
        held = {}

        def compute(m, x):
            held["result"] = {"y": [m.a(x)]}
            return held["result"]

        assert wrapped_copy(Two(compute))(draw(rng)) is held["result"]

    @pytest.mark.parametrize("result", [None, 3, "text", [1, None], {}])
    def test_need_not_be_variables(self, result, rng):
        assert wrapped_copy(Two(lambda m, x: result))(draw(rng)) == result

    def test_may_be_an_input(self, rng):
        assert_exact(Two(lambda m, x: (x, m.a(x))), [draw(rng)], decisions=1)

    def test_may_be_a_parameter(self, rng):
        assert_exact(Two(lambda m, x: (m.a.W, m.b(m.a(x)))), [draw(rng)], decisions=2)

    def test_may_be_a_loss(self, rng):
        link = Two(lambda m, x, t: F.softmax_cross_entropy(m.b(F.relu(m.a(x))), t))
        t = np.array([0, 3, 1], np.int32)
        assert_exact(link, [draw(rng)], lambda model, x: model(x, t), decisions=2)

    def test_of_float16_come_out_in_the_dtype_asked_for(self, rng):
        with dtype("mixed16"):
            link = Two(lambda m, x: (m.a(x), F.cast(m.b(x), np.float32), F.argmax(x, axis=1)))
        x = draw(rng).astype(np.float16)
        dtypes = {None: np.float16, "float32": np.float32, np.float64: np.float64}
        for output_dtype, expected in dtypes.items():
            first, second, third = wrapped_copy(link, output_dtype=output_dtype)(x)
            assert (first.dtype, second.dtype, third.dtype) == (expected, np.float32, np.int32)

    @pytest.mark.parametrize("mode", [chainer.no_backprop_mode, chainer.force_backprop_mode])
    def test_have_the_same_dtype_with_and_without_backprop(self, mode, rng):
        with dtype("float16"):
            link = Two(lambda m, x: m.b(m.a(x)))
        with mode():
            y = wrapped_copy(link)(draw(rng).astype(np.float16))
        assert y.dtype == np.float32
        assert (y.creator is None) == (mode is chainer.no_backprop_mode)

    def test_without_backprop_have_no_graph(self, rng):
        scaled = wrapped_copy(Two(lambda m, x: m.b(m.a(x))))
        with chainer.no_backprop_mode():
            y = scaled(draw(rng))
        assert y.creator is None
        assert y.requires_grad


class TestSeveralScopes:
    def test_side_by_side_and_one_after_the_other(self, rng):
        class Both(chainer.Chain):
            def __init__(self, wrap):
                super().__init__()
                with self.init_scope():
                    self.one = wrap(Two(lambda m, x: m.b(F.relu(m.a(x))) + x))
                    self.between = L.Linear(4, 4)
                    self.other = wrap(Two(lambda m, x: m.b(m.a(x)) * x))

            def forward(self, x):
                h = self.between(self.one(x))
                return self.other(h) + self.one(self.other(x))

        plain = Both(lambda link: link)
        scaled = Both(lambda link: AdaLossScaled(link, "auto", init_scale=2.0**-7))
        for (path, ours), (other, theirs) in zip(scaled.namedparams(), plain.namedparams(), strict=True):
            assert path == other
            ours.copydata(theirs)
        run = lambda model, x: weighted_sum(model(x))  # noqa: E731
        x = draw(rng)
        expected = gradients(plain, run, [x])
        found = gradients(scaled, run, [x])
        for path in expected[1]:
            np.testing.assert_array_equal(found[1][path], expected[1][path])
        assert scaled.one.ada_loss.decisions and scaled.other.ada_loss.decisions

    def test_one_inside_another_is_just_its_link(self, rng):
        class Outer(chainer.Chain):
            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.inner = AdaLossScaled(Two(lambda m, x: m.b(F.relu(m.a(x)))))
                    self.head = L.Linear(4, 2)

            def forward(self, x):
                h = self.inner(x)
                assert h.dtype == x.dtype
                return self.head(h)

        with dtype("float16"):
            scaled = AdaLossScaled(Outer(), "auto")
        for mode in (chainer.no_backprop_mode, chainer.force_backprop_mode):
            with mode():
                y = scaled(chainer.Variable(draw(rng).astype(np.float16)))
        scaled.cleargrads()
        weighted_sum(y).backward()
        paths = {decision.site.path for decision in scaled.ada_loss.decisions}
        assert paths == {"/head", "/inner/a", "/inner/b", "(entry)"}
        assert not scaled.inner.ada_loss.decisions

    def test_a_gradient_goes_from_one_to_the_other_in_flight(self, rng):
        with dtype("mixed16"):
            first, second = (Two(lambda m, x: m.b(F.tanh(m.a(x)))) for _ in range(2))
        wide = chainer.Sequential(*[Two(link.compute) for link in (first, second)])
        wide[0].copyparams(first)
        wide[1].copyparams(second)
        x = draw(rng).astype(np.float16)
        one, other = wrapped_copy(first, output_dtype=None), wrapped_copy(second)
        one.cleargrads()
        (weighted_sum(other(one(x))) * 2.0**-22).backward()
        _, expected = gradients(wide, lambda m, x: weighted_sum(m(x)), [x.astype(np.float32)])
        for path, gradient in one.true_gradients().items():
            assert signal_to_noise(np.ldexp(gradient, 22), expected[f"/0{path}"]) > 40
