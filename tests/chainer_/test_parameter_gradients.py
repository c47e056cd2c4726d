"""Gradients that are sums: under `auto` they have scales of their own."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, kernels, prepare
from ada_loss.chainer.parameter_gradients import parameter_gradients


class Raw(chainer.Link):
    """A function of its input, a weight and a bias."""

    def __init__(self, function, weight, bias):
        super().__init__()
        self.function = function
        with self.init_scope():
            self.W = chainer.Parameter(chainer.initializers.Normal(0.5), weight)
            self.b = chainer.Parameter(chainer.initializers.Normal(0.5), bias)

    def forward(self, x):
        return self.function(x, self.W, self.b)


def covering(function):
    """A convolution whose stride leaves a rest, which it covers."""
    return lambda x, W, b: function(x, W, b, stride=2, cover_all=True)


def masked(x, W, b):
    """Dropconnect that drops the same weights every time, some of all and others of single samples."""
    shape = (len(x), *W.shape)
    mask = np.arange(np.prod(shape)).reshape(shape) % 7 % 3 > 0
    return F.simplified_dropconnect(x, W, b, ratio=0.5, mask=mask)


LAYERS = {
    "linear": (lambda: L.Linear(8, 6), (512, 8)),
    "convolution": (lambda: L.Convolution2D(8, 6, 3, pad=1), (8, 8, 16, 16)),
    "strided convolution": (lambda: L.Convolution2D(4, 6, 3, stride=2), (16, 4, 11, 11)),
    "grouped convolution": (lambda: L.Convolution2D(8, 6, 3, pad=1, groups=2), (8, 8, 16, 16)),
    "dilated convolution": (lambda: L.DilatedConvolution2D(4, 6, 3, dilate=2), (8, 4, 12, 12)),
    "depthwise convolution": (lambda: L.DepthwiseConvolution2D(4, 2, 3), (8, 4, 12, 12)),
    "covering convolution": (lambda: Raw(covering(F.convolution_2d), (6, 4, 3, 3), 6), (16, 4, 10, 10)),
    "deconvolution": (lambda: L.Deconvolution2D(8, 6, 3, stride=2), (8, 8, 9, 9)),
    "grouped deconvolution": (lambda: L.Deconvolution2D(8, 6, 3, groups=2), (8, 8, 9, 9)),
    "convolution 1d": (lambda: L.Convolution1D(4, 6, 3), (16, 4, 40)),
    "convolution 3d": (lambda: L.Convolution3D(8, 6, 3), (2, 8, 6, 6, 6)),
    "covering convolution nd": (lambda: Raw(covering(F.convolution_nd), (6, 4, 3, 3), 6), (16, 4, 10, 10)),
    "deconvolution 3d": (lambda: L.Deconvolution3D(4, 6, 3), (2, 4, 5, 5, 5)),
    "local convolution": (lambda: L.LocalConvolution2D(2, 6, 5, 3), (256, 2, 5, 5)),
    "dropconnect": (lambda: Raw(masked, (6, 8), 6), (256, 8)),
}


@pytest.fixture(params=["chainer", "numpy", "torch"], autouse=True)
def provider(request):
    """Whatever computes the products."""
    if request.param == "torch":
        pytest.importorskip("torch")
    with kernels.using(request.param):
        yield request.param


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
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_sums_over_a_large_batch_neither_overflow_nor_vanish(name, exponent, provider):
    layer, x, gy = make(name)
    expected = reference(layer, x, gy, exponent)
    found = gradients("auto", layer, x, gy, exponent)
    for path, gradient in expected.items():
        # Chainer itself adds float16 in float16.
        np.testing.assert_allclose(found[path], gradient, rtol=5e-2 if provider == "chainer" else 2e-3)


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


@pytest.mark.parametrize("factor", [100.0, 10000.0])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_gradients_of_computed_weights_have_room_for_what_follows(factor):
    class Computed(chainer.Link):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.W = chainer.Parameter(chainer.initializers.Normal(1 / factor), (6, 8))

        def forward(self, x):
            return F.linear(x, F.identity(self.W) * factor)

    with chainer.using_config("dtype", np.float16):
        model = AdaLossScaled(Computed())
    optimizer = prepare(chainer.optimizers.SGD(0.0).setup(model))
    x = np.random.default_rng(5).uniform(1, 2, (64, 8)).astype(np.float16)
    for _ in range(16):
        optimizer.update(lambda: F.sum(model(x)))
    assert optimizer.entry_scale.skipped < 16
    expected = np.broadcast_to(factor * x.astype(np.float64).sum(axis=0), (6, 8))
    np.testing.assert_allclose(model.true_gradients()["/W"], expected, rtol=2e-3)


def of_parameter(function, shape):
    """A link that gives its parameter, and ones, to a function."""

    class Function(chainer.Link):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.p = chainer.Parameter(chainer.initializers.Uniform(0.5), shape)

        def forward(self, x):
            return function(self.p, x)

    return Function


ROWS = 6000

MANY = {
    "embedding": lambda: L.EmbedID(3, 4),
    "picked rows": of_parameter(lambda p, x: p[np.zeros(ROWS, int)], (3, 4)),
    "repeated rows": of_parameter(lambda p, x: F.repeat(p, ROWS, axis=0), (1, 4)),
    "broadcast": of_parameter(lambda p, x: F.broadcast_to(p, (ROWS, 4)), (1, 4)),
    "factor": of_parameter(lambda p, x: x * p, (1, 4)),
    "divisor": of_parameter(lambda p, x: x / (p + 2), (1, 4)),
    "exponent": of_parameter(lambda p, x: (-x) ** p, (1, 4)),
    "maximum": of_parameter(lambda p, x: F.maximum(p, x), (1, 4)),
    "minimum": of_parameter(lambda p, x: F.minimum(p, -x), (1, 4)),
    "prelu": lambda: L.PReLU((4,)),
    "swish": lambda: L.Swish((4,)),
    "scale": lambda: L.Scale(1, (4,), bias_term=True),
    "group normalization": lambda: L.GroupNormalization(2, 4),
    "layer normalization": lambda: L.LayerNormalization(4),
}


@pytest.mark.parametrize("name", MANY)
def test_sums_of_more_equal_numbers_than_float16_can_count_are_right(name, provider, rng):
    if provider == "chainer":
        pytest.skip("Chainer adds in float16")
    with chainer.using_config("dtype", np.dtype(np.float16)):
        link = MANY[name]()
    wide = link.copy("copy")
    for parameter in wide.params():
        parameter.array = parameter.array.astype(np.float64)
    shape = (ROWS,) if name == "embedding" else (ROWS, 4)
    x = np.zeros(shape, np.int32) if name == "embedding" else -rng.uniform(1, 1.1, shape).astype(np.float16)
    scaled = AdaLossScaled(link)
    for model, data in ((scaled, x), (wide, x if x.dtype.kind == "i" else x.astype(np.float64))):
        model.cleargrads()
        F.sum(model(data)).backward()
    for path, parameter in wide.namedparams():
        # What cancels in a normalization is as good as its terms.
        tolerance = 1e-2 * ROWS * (path == "/gamma")
        np.testing.assert_allclose(
            scaled.true_gradients()[path], parameter.grad, rtol=2e-3, atol=tolerance, err_msg=path
        )
