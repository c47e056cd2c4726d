"""Gradients that are sums: under `auto` they have scales of their own."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.sums import parameter_gradients

LAYERS = {
    "linear": (lambda: L.Linear(8, 6), (512, 8)),
    "convolution": (lambda: L.Convolution2D(8, 6, 3, pad=1), (8, 8, 16, 16)),
    "grouped convolution": (lambda: L.Convolution2D(8, 6, 3, pad=1, groups=2), (8, 8, 16, 16)),
    "deconvolution": (lambda: L.Deconvolution2D(8, 6, 3, stride=2), (8, 8, 9, 9)),
    "convolution 3d": (lambda: L.Convolution3D(8, 6, 3), (2, 8, 6, 6, 6)),
}


def gradients(method, layer, x, gy, exponent):
    """True gradients for a loss of sum(y * gy) * 2**exponent."""
    model = AdaLossScaled(layer, loss_scale_method=method)
    model.cleargrads()
    loss = F.sum(model(chainer.Variable(x)) * gy)
    loss.grad = np.array(2.0**exponent, np.float32)
    loss.backward()
    return model.true_gradients()


def make(name, seed=0):
    """A float16 layer, its input and an output gradient, all positive: every sum is as large as it can be."""
    rng = np.random.default_rng(seed)
    build, shape = LAYERS[name]
    with chainer.using_config("dtype", np.float16):
        layer = build()
        y = layer(np.zeros(shape, np.float16))
    return (
        layer,
        rng.uniform(1, 2, size=shape).astype(np.float16),
        rng.uniform(1, 2, y.shape).astype(np.float32),
    )


def reference(layer, x, gy, exponent):
    wide = layer.copy("copy")
    for parameter in wide.params():
        parameter.array = parameter.array.astype(np.float64)
    wide.cleargrads()
    F.sum(wide(chainer.Variable(x.astype(np.float64))) * gy.astype(np.float64)).backward()
    return {path: np.ldexp(parameter.grad, exponent) for path, parameter in wide.namedparams()}


@pytest.mark.parametrize("exponent", [-30, 0, 30])
@pytest.mark.parametrize("name", LAYERS)
def test_sums_over_a_large_batch_neither_overflow_nor_vanish(name, exponent):
    layer, x, gy = make(name)
    expected = reference(layer, x, gy, exponent)
    found = gradients("auto", layer, x, gy, exponent)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, rtol=2e-3)


@pytest.mark.parametrize("input_scale", [2.0**-14, 2.0**-20])
def test_weight_gradients_of_tiny_inputs_keep_their_precision(input_scale):
    layer, x, gy = make("linear")
    x = (x * np.float32(input_scale)).astype(np.float16)
    found = gradients("auto", layer, x, gy * np.float32(1e-6), 0)
    np.testing.assert_allclose(found["/W"], reference(layer, x, gy * 1e-6, 0)["/W"], rtol=2e-3)


@pytest.mark.parametrize("method", ["fixed", "approx_range", "abs_range", "element_wise_range"])
def test_under_the_papers_rules_parameters_share_the_scale_of_what_arrives(method):
    layer, x, gy = make("linear")
    found = gradients(method, layer, x, gy, 7)
    assert not np.isfinite(found["/W"]).any()


def test_float32_layers_are_left_to_chainer():
    layer = L.Linear(8, 6)
    y = layer(np.ones((3, 8), np.float32))
    assert parameter_gradients(y.creator_node, (0, 1, 2), np.ones((3, 6), np.float32), 0) == {}


def test_float32_parameters_of_a_float16_layer_keep_their_type():
    layer, x, gy = make("linear")
    layer.W.array = layer.W.array.astype(np.float32)
    y = layer(x)
    assert set(parameter_gradients(y.creator_node, (0, 1, 2), gy.astype(np.float16), 0)) == {2}
