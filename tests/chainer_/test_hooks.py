"""Function hooks: they see the true gradients, and what they do with them counts."""

import chainer
import chainer.functions as F
import numpy as np
import pytest

from helpers import assert_same_bits, dtype, signal_to_noise
from twins import Graph, draw, gradients, weighted_sum, wrapped_copy
from user_code import again

SMALL = 2.0**-18


class Acting(chainer.FunctionHook):
    """Does something with every gradient before backward, and notes it."""

    name = "Acting"

    def __init__(self, act=lambda gy: None, only=None):
        self.act, self.only, self.seen = act, only, []

    def backward_preprocess(self, function, in_data, gys):
        if self.only in (None, function.label):
            for gy in gys:
                self.seen.append((function.label, gy.copy()))
                self.act(gy)


class ActingAfterwards(chainer.FunctionHook):
    """Does something after every backward of a function that is labelled so."""

    name = "ActingAfterwards"

    def __init__(self, act, only):
        self.act, self.only = act, only

    def backward_postprocess(self, function, in_data, gys):
        if function.label == self.only:
            self.act()


def combine(m, x):
    h = F.tanh(m.a(x))
    return m.c(F.relu(m.b(h)) + h)


def observed(link, hook, x, factor=1.0):
    """The gradients of a loss that counts `factor`, computed with a hook."""
    with hook:
        return gradients(link, lambda model, x: weighted_sum(model(x)), [x], factor)[1]


ACTS = {
    "clips": lambda gy: np.clip(gy, -0.05, 0.05, out=gy),
    "normalizes": lambda gy: np.divide(gy, np.linalg.norm(gy) or 1, out=gy),
    "adds noise": lambda gy: np.add(gy, np.random.standard_normal(gy.shape).astype("f"), out=gy),
    "makes tiny": lambda gy: np.multiply(gy, np.float32(1e-6), out=gy),
    "makes large": lambda gy: np.multiply(gy, np.float32(1e5), out=gy),
    "clears": lambda gy: gy.fill(0),
}


class TestInFloat32:
    def test_see_what_plain_chainers_hooks_see_bit_for_bit(self, rng):
        link, x, hooks = Graph(combine), draw(rng), [Acting(), Acting()]
        for model, hook in zip((link, wrapped_copy(link)), hooks, strict=True):
            observed(model, hook, x)
        for (theirs, expected), (ours, seen) in zip(hooks[0].seen, hooks[1].seen, strict=True):
            assert ours == theirs and seen.dtype == np.float32
            np.testing.assert_array_equal(seen, expected, err_msg=ours)

    @pytest.mark.parametrize("kind", ACTS)
    @pytest.mark.parametrize("only", ["LinearFunction", "Tanh", "_ + _", "ReLU", "Sin"])
    def test_change_gradients_in_place_as_plain_chainers_do(self, kind, only, rng):
        link, x = Graph(combine), draw(rng)
        found = [observed(m, Acting(ACTS[kind], only), x) for m in (wrapped_copy(link), link)]
        assert_same_bits(*found)

    def test_of_one_function_may_change_it_too(self, rng):
        def hooked(m, x):
            y = m.a(x)
            if y.creator_node is not None:
                y.creator_node.add_hook(Acting(ACTS["clips"]))
            return m.b(F.relu(y))

        link, x = Graph(hooked), draw(rng)
        found = [
            gradients(m, lambda model, x: weighted_sum(model(x)), [x])[1] for m in (wrapped_copy(link), link)
        ]
        assert_same_bits(*found)

    def test_a_changed_gradient_is_what_is_retained(self, rng):
        def keeping(m, x):
            m.kept = F.tanh(m.a(x))
            return m.b(m.kept)

        link, x, found = Graph(keeping), draw(rng), []
        for model in (wrapped_copy(link), link):
            with Acting(ACTS["clips"], "Tanh"):
                weighted_sum(model(x)).backward(retain_grad=True)
            found.append({"kept": model.kept.grad})
        assert_same_bits(*found)

    def test_start_passes_of_their_own(self, rng):
        link, x, other = Graph(lambda m, x: m.b(F.relu(m.a(x)))), draw(rng), draw(rng)
        found = []
        for model in (wrapped_copy(link), link):

            def penalize(model=model):
                with chainer.force_backprop_mode():
                    loss = F.sum(F.tanh(model.c(other)))
                loss.backward()

            found.append(observed(model, ActingAfterwards(penalize, "ReLU"), x))
        assert_same_bits(*found)

    def test_read_and_write_gradients_of_parameters(self, rng):
        link, x = Graph(lambda m, x: m.b(F.relu(m.a(x)))), draw(rng)
        found = []
        for model in (wrapped_copy(link), link):

            def decay(model=model):
                W = model.c.W
                W.grad = W.array * 1 if W.grad is None else W.grad + W.array
                W.grad *= 2

            found.append(observed(model, ActingAfterwards(decay, "ReLU"), x))
        assert_same_bits(*found)


# Gradients that a hook has made tiny are none that float16 holds, at the input.
@pytest.mark.filterwarnings("ignore:The gradient of an input underflows")
class TestInFloat16:
    def pair(self):
        with dtype("mixed16"):
            narrow = Graph(combine)
        wide = Graph(combine)
        wide.copyparams(narrow)
        return wrapped_copy(narrow), wide

    def test_see_the_true_gradients_in_float32(self, rng):
        narrow, wide = self.pair()
        x, hooks = draw(rng).astype("e"), [Acting(), Acting()]
        observed(narrow, hooks[0], x, SMALL)
        observed(wide, hooks[1], x.astype("f"), SMALL)
        seen = [gy for label, gy in hooks[0].seen if label not in ("Cast",)]
        expected = [gy for label, gy in hooks[1].seen if label not in ("Cast",)]
        assert {gy.dtype for gy in seen} == {np.dtype(np.float32)}
        for ours, theirs in zip(seen, expected, strict=True):
            assert signal_to_noise(ours, theirs) > 40

    @pytest.mark.parametrize("kind", ACTS)
    @pytest.mark.parametrize("only", ["LinearFunction", "Tanh", "_ + _"])
    def test_change_gradients_in_place(self, kind, only, rng):
        narrow, wide = self.pair()
        x = draw(rng).astype("e")
        found = observed(narrow, Acting(ACTS[kind], only), x, SMALL)
        expected = observed(wide, Acting(ACTS[kind], only), x.astype("f"), SMALL)
        for path, _ in wide.namedparams():
            assert signal_to_noise(found[path], expected[path]) > 40, path

    def pair_that_computes_again(self):
        block = lambda m, h: F.tanh(m.b(h))  # noqa: E731
        combine = lambda m, x: m.c(again(lambda h: block(m, h), F.tanh(m.a(x))))  # noqa: E731
        with dtype("mixed16"):
            narrow = Graph(combine)
        wide = Graph(combine)
        wide.copyparams(narrow)
        return wrapped_copy(narrow), wide

    def test_are_called_once_in_passes_inside_a_backward(self, rng):
        x, seen = draw(rng).astype("e"), []
        for model in self.pair_that_computes_again():
            with Acting() as hook:
                gradients(model, lambda m, x: weighted_sum(m(x)), [x.astype(model.a.W.dtype)], SMALL)
            seen.append([label for label, _ in hook.seen if label != "Cast"])
        assert seen[0] == seen[1]

    @pytest.mark.parametrize("kind", ["clips", "makes tiny"])
    def test_change_gradients_in_passes_inside_a_backward(self, kind, rng):
        x, found = draw(rng).astype("e"), []
        for model in self.pair_that_computes_again():
            x = x.astype(model.a.W.dtype)
            found.append(observed(model, Acting(ACTS[kind], "Tanh"), x, SMALL))
        for path, expected in found[1].items():
            if path.startswith("/"):
                assert signal_to_noise(found[0][path], expected) > 35, path

    def test_leave_bits_alone_that_they_do_not_change(self, rng):
        narrow, _ = self.pair()
        x, found = draw(rng).astype("e"), []
        for hook in (chainer.function_hooks.TimerHook(), Acting()):
            found.append(observed(narrow, hook, x, SMALL))
        assert_same_bits(*found)


@pytest.mark.parametrize("when", ["backward_preprocess", "backward_postprocess"])
@pytest.mark.parametrize("label", ["LinearFunction", "ReLU", "Tanh"])
def test_a_hook_that_clears_gradients_clears_what_plain_chainers_does(when, label, rng):
    link, x, found = Graph(combine), draw(rng), []
    for model in (wrapped_copy(link), link):

        class Clearing(chainer.FunctionHook):
            name = "Clearing"

        def clear(self, function, in_data, gys, model=model):
            if function.label == label:
                model.cleargrads()

        setattr(Clearing, when, clear)
        model.cleargrads()
        weighted_sum(model(x)).backward()
        with Clearing():
            weighted_sum(model(x)).backward()
        found.append({path: parameter.grad for path, parameter in model.namedparams()})
    assert_same_bits(*found)
