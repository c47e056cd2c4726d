"""Which functions are recorded, in every thread and after errors, and what their links are called."""

import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer.tagging import LinkPaths, active_recorder, tag_of
from twins import Two, assert_exact, draw, weighted_sum, wrapped_copy


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
        assert [decision.site.path for decision in scaled.ada_loss.decisions] == ["/", "/b", "/a"]

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
                np.testing.assert_array_equal(scaled.a.W.grad, link.a.W.grad)
                assert {decision.site.call for decision in scaled.ada_loss.decisions} == {0}
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
        assert [decision.site.path for decision in scaled.ada_loss.decisions] == ["/"]
