"""Scopes: what goes in and comes out, what a link keeps, several of them, and what they leave behind."""

import collections
import gc
import threading
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.recorder import LinkPaths, active_recorder, tag_of
from helpers import dtype, signal_to_noise
from twins import assert_exact, gradients, weighted_sum, wrapped_copy

Pair = collections.namedtuple("Pair", "first second")


class Two(chainer.Chain):
    """Two layers and whatever is done with them."""

    def __init__(self, compute):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))
        self.compute = compute

    def forward(self, *args, **kwargs):
        return self.compute(self, *args, **kwargs)


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


def draw(rng, *shape):
    return rng.standard_normal(shape or (3, 4)).astype(np.float32)


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
            link = model.link if isinstance(model, AdaLossScaled) else model
            return weighted_sum(model(link.b.W)) + weighted_sum(model(x))

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
        assert scaled.link.b.W.grad is not None

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
        calls = {decision.site.call for decision in scaled.decisions if decision.site.path == "/outside"}
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
        assert scaled.one.decisions and scaled.other.decisions

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
        paths = {decision.site.path for decision in scaled.decisions}
        assert paths == {"/head", "/inner/link/a", "/inner/link/b", "(entry)"}
        assert not scaled.link.inner.decisions

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


class TestErrors:
    def test_a_link_that_raises_leaves_no_recorder(self, rng):
        def compute(m, x):
            m.a(x)
            raise KeyError("mine")

        scaled = wrapped_copy(Two(compute))
        with pytest.raises(KeyError, match="mine"):
            scaled(draw(rng))
        assert active_recorder() is None
        assert not chainer.get_function_hooks()
        assert not chainer._get_link_hooks()
        assert tag_of(F.sin(chainer.Variable(draw(rng))).creator_node) is None

    def test_a_layer_whose_error_is_caught_does_not_count_as_running(self, rng):
        class Fragile(chainer.Chain):
            def __init__(self):
                super().__init__(inner=L.Linear(4, 4))

            def forward(self, x):
                try:
                    self.inner(x[:, :3])
                except chainer.utils.type_check.InvalidType:
                    return x

        link = Two(lambda m, x: F.linear(m.c(m.b(m.a(x))), m.a.W))
        link.add_link("c", Fragile())
        scaled = assert_exact(link, [draw(rng)], decisions=3)
        assert [decision.site.path for decision in scaled.decisions] == ["/", "/b", "/a"]

    def test_an_error_in_backward_leaves_the_engine_usable(self, rng):
        class Broken(chainer.FunctionNode):
            def forward(self, inputs):
                return inputs

            def backward(self, targets, gys):
                raise KeyError("mine")

        broken = wrapped_copy(Two(lambda m, x: m.b(Broken().apply((m.a(x),))[0])))
        with pytest.raises(KeyError, match="mine"):
            weighted_sum(broken(draw(rng))).backward()
        assert_exact(Two(lambda m, x: m.b(m.a(x))), [draw(rng)], decisions=2)


class TestThreads:
    def test_models_in_different_threads_do_not_see_each_other(self, rng):
        errors, barrier = [], threading.Barrier(3)

        def work(seed):
            try:
                generator = np.random.default_rng(seed)
                link = Two(lambda m, x: (barrier.wait(), m.b(F.relu(m.a(x))))[1])
                scaled = wrapped_copy(link)
                x = draw(generator)
                for model in (scaled, link):
                    model.cleargrads()
                    weighted_sum(model(x)).backward()
                np.testing.assert_array_equal(scaled.link.a.W.grad, link.a.W.grad)
                assert {decision.site.call for decision in scaled.decisions} == {0}
            except Exception as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors

    def test_a_scope_in_one_thread_marks_no_function_of_another(self, rng):
        tags = []

        def compute(m, x):
            thread = threading.Thread(target=lambda: tags.append(tag_of(F.sin(m.a.W).creator_node)))
            thread.start()
            thread.join()
            return m.a(x)

        y = wrapped_copy(Two(compute))(draw(rng))
        assert tags == [None]
        assert tag_of(y.creator_node) is not None


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
        graph, model = self.graph_of(scaled.layer.h), weakref.ref(scaled.link)
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


class TestPaths:
    @pytest.fixture
    def tree(self):
        return chainer.Chain(a=L.Linear(2), b=chainer.Sequential(L.Linear(2), L.Linear(3)))

    def test_are_those_of_the_tree(self, tree):
        paths = LinkPaths()
        assert {paths.find(link, tree) for _, link in tree.namedlinks()} == {"/", "/a", "/b", "/b/0", "/b/1"}

    def test_of_links_that_were_added_later_are_found(self, tree):
        paths = LinkPaths()
        assert paths.find(tree.a, tree) == "/a"
        tree.add_link("late", L.Linear(2))
        assert paths.find(tree.late, tree) == "/late"

    def test_of_other_links_are_none(self, tree):
        assert LinkPaths().find(L.Linear(2), tree) is None

    def test_of_links_that_are_gone_are_not_those_of_their_successors(self, tree):
        paths = LinkPaths()
        for _ in range(20):
            assert paths.find(tree.a, tree) == "/a"
            del tree.a
            stranger = L.Linear(2)
            assert paths.find(stranger, tree) is None
            del stranger
            tree.add_link("a", L.Linear(2))

    def test_a_link_that_is_not_registered_counts_as_the_one_around_it(self, rng):
        hidden = [L.Linear(4, 4)]
        scaled = wrapped_copy(Two(lambda m, x: hidden[0](m.a(x))))
        weighted_sum(scaled(draw(rng))).backward()
        assert [decision.site.path for decision in scaled.decisions] == ["/"]
