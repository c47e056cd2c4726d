"""Decision points: which functions they are, how many products they sum, how shifts enter their backward."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.functions.connection.linear import LinearFunction

import pretended_gpu
from ada_loss.arrays.measuring import measure
from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.gradient import shifted
from ada_loss.chainer.products import _scaled_operands, input_gradient, is_decision, products_of
from ada_loss.core.config import TIMINGS, AdaLossConfig
from ada_loss.core.deferred import fetch
from ada_loss.core.formats import FLOAT16
from ada_loss.core.measurement import Factor
from helpers import dtype

PRODUCTS = {
    "linear": (F.linear, [(3, 6), (4, 6)]),
    "convolution 1d": (F.convolution_1d, [(2, 3, 9), (5, 3, 3)]),
    "convolution 2d": (F.convolution_2d, [(2, 3, 9, 8), (5, 3, 3, 2)]),
    "dilated convolution": (lambda x, W: F.convolution_2d(x, W, dilate=2), [(1, 3, 12, 12), (5, 3, 3, 3)]),
    "grouped convolution": (lambda x, W: F.convolution_2d(x, W, groups=2), [(2, 4, 9, 9), (6, 2, 3, 3)]),
    "depthwise convolution": (F.depthwise_convolution_2d, [(2, 3, 9, 9), (2, 3, 3, 3)]),
    "local convolution": (F.local_convolution_2d, [(2, 3, 9, 9), (4, 7, 7, 3, 3, 3)]),
    "strided local convolution": (
        lambda x, W: F.local_convolution_2d(x, W, stride=2),
        [(2, 3, 9, 9), (4, 4, 4, 3, 3, 3)],
    ),
    "convolution 3d": (F.convolution_3d, [(1, 2, 5, 5, 5), (3, 2, 2, 2, 2)]),
    "deconvolution 1d": (F.deconvolution_1d, [(2, 3, 5), (3, 4, 3)]),
    "deconvolution 2d": (F.deconvolution_2d, [(2, 3, 5, 5), (3, 4, 3, 2)]),
    "strided deconvolution": (lambda x, W: F.deconvolution_2d(x, W, stride=2), [(2, 3, 5, 5), (3, 4, 3, 3)]),
    "grouped deconvolution": (lambda x, W: F.deconvolution_2d(x, W, groups=2), [(2, 4, 5, 5), (4, 3, 3, 3)]),
    "deconvolution 3d": (F.deconvolution_3d, [(1, 2, 3, 3, 3), (2, 3, 2, 2, 2)]),
    "dot product": (F.matmul, [(5,), (5,)]),
    "matrix times vector": (F.matmul, [(3, 5), (5,)]),
    "vector times matrix": (F.matmul, [(5,), (5, 4)]),
    "vector times matrices": (F.matmul, [(5,), (2, 5, 4)]),
    "matrix product": (F.matmul, [(3, 5), (5, 4)]),
    "transposed product": (lambda a, b: F.matmul(a, b, transa=True, transb=True), [(5, 3), (4, 5)]),
    "stacked products": (F.matmul, [(2, 3, 5), (2, 5, 4)]),
    "broadcast products": (F.matmul, [(3, 5), (2, 5, 4)]),
    "batch matmul": (F.batch_matmul, [(2, 3, 5), (2, 5, 4)]),
    "batch matmul of vectors": (lambda a, b: F.batch_matmul(a, b, transa=True), [(2, 5), (2, 5)]),
    "tensordot": (F.tensordot, [(3, 4, 5), (4, 5, 6)]),
    "tensordot over axes": (lambda a, b: F.tensordot(a, b, axes=((0, 2), (1, 0))), [(3, 4, 5), (5, 3, 6)]),
    "einsum": (lambda a, b: F.einsum("ijk,kl->lij", a, b), [(2, 3, 4), (4, 5)]),
    "einsum with dots": (lambda a, b: F.einsum("...ij,...jk->...ik", a, b), [(2, 6, 3, 4), (2, 6, 4, 5)]),
    "einsum that sums": (lambda a, b: F.einsum("ij,jk->", a, b), [(2, 3), (3, 4)]),
    "dropconnect": (lambda x, W: F.simplified_dropconnect(x, W, ratio=0.0), [(3, 6), (4, 6)]),
}


def applied(name, arrays):
    """The function node that a name stands for, applied to arrays, and what it returned."""
    y = PRODUCTS[name][0](*map(chainer.Variable, arrays))
    return y.creator_node, y


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_fan_is_the_largest_number_of_products_in_one_sum(name):
    # With ones for gy and weights, each element of the gradient counts the products that it is the sum of.
    node, y = applied(name, [np.ones(shape, np.float32) for shape in PRODUCTS[name][1]])
    gy = np.ones_like(y.array)
    for product in products_of(node):
        counts = input_gradient(node, product, gy, 0)
        assert product.fan(node, gy) == counts.max()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_shift_multiplies_the_input_gradient_and_changes_nothing_else(name, rng):
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in PRODUCTS[name][1]]
    before = [array.copy() for array in arrays]
    node, y = applied(name, arrays)
    gy = np.asarray(rng.standard_normal(y.shape), np.float32)
    for product in products_of(node):
        plain = input_gradient(node, product, gy, 0)
        for shift in (-9, 4, 17):
            np.testing.assert_array_equal(input_gradient(node, product, gy, shift), np.ldexp(plain, shift))
        np.testing.assert_array_equal(input_gradient(node, product, gy, 0), plain)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


FLOAT32_ONLY = {"batch matmul", "batch matmul of vectors"}


@pytest.mark.parametrize("name", PRODUCTS.keys() - FLOAT32_ONLY)
def test_a_shift_saves_from_float16_what_would_underflow(name, rng):
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in PRODUCTS[name][1]]
    node, y = applied(name, arrays)
    gy = np.asarray(2.0**-24 * rng.integers(-3, 4, y.shape), np.float16)
    exact, wide = applied(name, [array.astype(np.float64) for array in arrays])
    for product in products_of(node):
        assert wide.dtype == np.float64
        wanted = np.ldexp(input_gradient(exact, product, np.asarray(gy, np.float64), 0), 20)
        found = input_gradient(node, product, gy, 20)
        assert found.dtype == np.float16
        # Chainer adds up a local convolution's in float16.
        np.testing.assert_allclose(found, wanted, atol=2**-9 * np.abs(wanted).max())


def test_a_cast_that_leaves_float16_is_a_decision_and_no_other():
    def decides(source, target):
        y = F.cast(chainer.Variable(np.ones(3, source)), target)
        return is_decision(y.creator_node)

    assert decides(np.float16, np.float32)
    assert decides(np.float16, "float64")
    assert not decides(np.float32, np.float16)
    assert not decides(np.float32, np.float64)
    assert not decides(np.float16, "float16")
    assert not decides(np.int32, np.float16)


@pytest.mark.parametrize("subscripts", ["ij->ji", "ii->i", "ij,jk,kl->il"])
def test_an_einsum_of_other_than_two_operands_is_no_decision(subscripts, rng):
    y = F.einsum(subscripts, *[rng.standard_normal((3, 3)) for _ in subscripts.split(",")])
    assert not is_decision(y.creator_node)


@pytest.mark.parametrize("function", [F.relu, F.sum, lambda x: F.max_pooling_2d(x, 2), lambda x: x * x])
def test_everything_else_is_none(function):
    assert not is_decision(function(chainer.Variable(np.ones((2, 3, 4, 4), np.float32))).creator_node)


def test_subclasses_of_a_decision_point_are_decision_points():
    class Own(LinearFunction):
        pass

    (y,) = Own().apply((np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)))
    assert products_of(y.creator_node) == products_of(
        F.linear(*y.creator_node.get_retained_inputs()).creator_node
    )


@pytest.mark.parametrize("shift", [-9, 0, 1, 7, 40])
@pytest.mark.parametrize("size", [2.0**-20, 0.1, 3.0, 40000.0])
def test_float16_weights_on_a_gpu_carry_of_a_shift_what_is_exact(shift, size, rng, monkeypatch):
    pretended_gpu.pretend(monkeypatch)
    gy, weight = np.ones((1, 50), np.float16), (size * rng.uniform(-1, 1, 50)).astype(np.float16)[:, None]
    config = AdaLossConfig()
    (measurement,) = fetch([measure(config, gy, Factor(weight, 50))])
    found = config.rule.range(config, FLOAT16, measurement)
    scaled, lowered = _scaled_operands(weight, gy, shift, found.max_weight_shift)
    carried = int(np.log2(float(np.abs(scaled).max()) / float(np.abs(weight).max())))
    assert min(shift, 0) <= carried <= max(shift, 0)
    np.testing.assert_array_equal(scaled.astype(np.float64), np.ldexp(weight.astype(np.float64), carried))
    np.testing.assert_array_equal(lowered, shifted(gy, shift - carried))
    assert carried in (shift, 0) or 4 * np.abs(scaled.astype(np.float64)).max() > FLOAT16.max


class Seeing(chainer.FunctionHook):
    """Keeps the gradients that arrive at functions of a label."""

    def __init__(self, label):
        self.label, self.seen = label, []

    def backward_preprocess(self, function, in_data, gys):
        if function.label == self.label:
            self.seen.append(gys[0])


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("power", [-8, -14, -20])
def test_in_a_network_approx_range_lets_at_most_the_promised_share_of_gx_underflow(power, timing, rng):
    # The loss is linear, so that the last layer's gy is Gaussian, and behind a ReLU half of it is zero. The
    # weights are so small that gx has to be scaled up, whatever the cast at the end did.
    n_uf, small = 1e-2, chainer.initializers.Normal(2.0**-12)
    with chainer.using_config("dtype", np.dtype(np.float16)):
        link = chainer.Sequential(L.Linear(64, 64), F.sigmoid, L.Linear(64, 256, initialW=small), F.relu)
    model = AdaLossScaled(
        link, "approx_range", n_uf=n_uf, timing=timing, scale_upper_bound=None, accum_upper_bound=None
    )
    x, factors = rng.standard_normal((500, 64)).astype(np.float16), rng.standard_normal((500, 256))
    for _ in range(2):
        y = model(chainer.Variable(x))
        with Seeing("Sigmoid") as hook:
            (F.sum(y * factors.astype(np.float32)) * 2.0**power).backward()
    masked = (factors * (y.array > 0) * 2.0**power).astype(np.float64)
    exact = masked @ link[2].W.array.astype(np.float64)
    (gx,) = hook.seen
    assert n_uf / 10 < np.mean((gx == 0)[exact != 0]) <= n_uf


class TestConstants:
    """A float16 loss may be multiplied by any number: its power of two goes to the exponent."""

    def gradients(self, kind, combine, method="auto"):
        with dtype(kind):
            model = AdaLossScaled(L.Linear(6, 4), method)
        model.W.array[:] = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float16)
        x = np.random.default_rng(4).standard_normal((5, 6)).astype(np.float16)
        y = F.linear(x.astype(model.W.dtype), model.W, model.b)
        assert y.dtype == model.W.dtype
        model.cleargrads()
        combine(F.sum(y * y)).backward()
        return model.true_gradients()

    @pytest.mark.parametrize("number", [2.0**-18, -3e-7, 1e-12, 2.0**-40, 0.75, 5e4, np.float32(1e-6)])
    def test_the_gradient_survives_the_number(self, number):
        found = self.gradients("mixed16", lambda loss: loss * number)
        for path, wanted in self.gradients("float32", lambda loss: loss * number).items():
            assert relative_error(found[path], wanted) < 2**-9

    def test_the_gradient_survives_arrays_of_one_element(self):
        def combine(loss):
            small = np.full((), 2.0**-18, loss.dtype)
            return small * (loss * small)

        found = self.gradients("mixed16", combine)
        for path, wanted in self.gradients("float32", combine).items():
            assert relative_error(found[path], wanted) < 2**-9

    def test_a_variable_of_one_element_has_a_gradient_of_its_own(self):
        def run(kind):
            weight = chainer.Variable(np.full((), 0.5, "e" if kind == "mixed16" else "f"))
            return self.gradients(kind, lambda loss: loss * weight), weight.grad

        (found, own), (wanted, wanted_own) = run("mixed16"), run("float32")
        assert relative_error(own, wanted_own) < 2**-8
        assert all(relative_error(found[path], wanted[path]) < 2**-9 for path in wanted)

    def test_a_tiny_number_makes_up_for_the_large_gradient_of_a_loss(self):
        found = {}
        for kind, format in (("mixed16", np.float16), ("float32", np.float32)):
            with dtype(kind):
                model = AdaLossScaled(L.Linear(6, 1, initialW=0.5))
            model.cleargrads()
            y = F.linear(np.ones((1, 6), format), model.W, model.b)
            (F.mean_squared_error(y, np.full((1, 1), 6e4, format)) * 2.0**-20).backward()
            found[kind] = model.true_gradients()["/W"]
        assert relative_error(found["mixed16"], found["float32"]) < 2**-9

    def test_several_numbers_cancel(self):
        def combine(loss):
            return (((loss * 2.0**-20) * 2.0**-20) / 2.0**-20) / 2.0**-20

        with np.errstate(all="ignore"):
            found = self.gradients("mixed16", combine)
        for path, wanted in self.gradients("float32", combine).items():
            assert relative_error(found[path], wanted) < 2**-9

    def test_a_factor_of_zero_leaves_zeros(self):
        assert not any(g.any() for g in self.gradients("mixed16", lambda loss: loss * 0.0).values())

    def test_tasks_of_different_weights_add_up(self):
        def combine(loss):
            return loss * 2.0**-16 + (loss * 0.5) * 2.0**-15

        found = self.gradients("mixed16", combine)
        for path, wanted in self.gradients("float32", combine).items():
            assert relative_error(found[path], wanted) < 2**-8

    def test_in_float32_the_bits_are_plain_chainers(self):
        model = L.Linear(6, 4)
        found = {}
        for scaled in (False, True):
            if scaled:
                AdaLossScaled(model)
            model.cleargrads()
            (F.sum(model(np.ones((5, 6), np.float32)) ** 2) * 3e-7).backward()
            found[scaled] = model.W.grad.copy()
        assert np.array_equal(found[False], found[True])

    def test_the_papers_rule_lets_float16_round_it(self):
        found = self.gradients("mixed16", lambda loss: loss * 2.0**-40, "approx_range")
        assert not any(g.any() for g in found.values())


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
