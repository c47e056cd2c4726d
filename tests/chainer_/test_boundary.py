"""What enters and leaves a scope, in float16 too, and other ways to differentiate through it."""

import chainer
import chainer.functions as F
import numpy as np
import pytest

from helpers import assert_same_bits, dtype, signal_to_noise
from twins import Graph, Noting, draw, exact, gradients, weighted_sum, wrapped_copy


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

    @pytest.mark.filterwarnings("ignore:Gradients that are to be differentiated again")
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

    def test_a_float16_input_whose_gradient_vanishes_is_told_of(self, rng):
        with dtype("float16"):
            scaled = wrapped_copy(Graph(lambda m, x: m.b(F.tanh(m.a(x)))))
        x = chainer.Variable(draw(rng).astype(np.float16))
        loss = weighted_sum(scaled(x)) * np.float32(2.0**-30)
        with pytest.warns(UserWarning, match="gradient of an input underflows.*chainer.grad"):
            loss.backward()
        assert not x.grad.any()
        (gx,) = chainer.grad([loss], [x])
        assert gx.array.all()

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
        with Noting() as hook:
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
        assert not np.isfinite(scaled.a.W.grad).all()

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
