"""Functions that Chainer's own code computes in float32 under the provider `numpy`."""

import chainer.functions as F
import numpy as np
import pytest

from chainer_.kernels_.reference import assert_rounded_once, in_float64, run

CASES = {
    "convolution_1d": (F.convolution_1d, [(2, 3, 20), (4, 3, 5), (4,)]),
    "convolution_3d": (lambda x, W: F.convolution_3d(x, W, pad=1), [(2, 2, 5, 4, 3), (3, 2, 3, 3, 3)]),
    "grouped convolution_1d": (lambda x, W: F.convolution_1d(x, W, groups=2), [(2, 4, 9), (6, 2, 3)]),
    "deconvolution_1d": (lambda x, W: F.deconvolution_1d(x, W, stride=2), [(2, 3, 8), (3, 4, 4)]),
    "matmul": (F.matmul, [(20, 30), (30, 10)]),
    "batched, transposed matmul": (lambda a, b: F.matmul(a, b, True, True), [(2, 3, 30, 20), (2, 3, 10, 30)]),
    "matrix by vector": (F.matmul, [(7, 5), (5,)]),
    "inner product": (F.matmul, [(50,), (50,)]),
    "sigmoid": (F.sigmoid, [(40, 50)]),
    "tanh": (F.tanh, [(40, 50)]),
    "softmax": (F.softmax, [(40, 50)]),
    "log_softmax": (lambda x: F.log_softmax(x, axis=2), [(4, 3, 50)]),
}


def random(rng, shapes, dtype=np.float16):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_float64_ones_rounded_once_and_gradients_follow(name):
    function, shapes = CASES[name]
    rng = np.random.default_rng(0)
    inputs = random(rng, shapes)
    y, _ = in_float64(function, inputs, None)
    (gy,) = random(rng, [y.shape])
    exact, exact_gradients = in_float64(function, inputs, gy)
    actual, gradients = run(function, inputs, gy, "numpy")
    assert actual.dtype == np.float16
    # Sums are as large as the largest results here; 100 float32 operations do not make a float16 rounding.
    assert_rounded_once(actual, exact, np.abs(exact).max(), 100)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == np.float16
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["convolution_1d", "deconvolution_1d"])
def test_a_float32_weight_of_a_convolution_keeps_its_gradient_in_float32(name):
    function, (x_shape, W_shape, *_) = CASES[name]
    rng = np.random.default_rng(1)
    (x,), (W,) = random(rng, [x_shape]), random(rng, [W_shape], np.float32)
    y, _ = in_float64(function, [x, W], None)
    (gy,) = random(rng, [y.shape])
    exact, (_, exact_gW) = in_float64(function, [x, W], gy)
    actual, (gx, gW) = run(function, [x, W], gy, "numpy")
    assert (actual.dtype, gx.dtype, gW.dtype) == (np.float16, np.float16, np.float32)
    assert_rounded_once(actual, exact, np.abs(exact).max(), 100)
    assert_rounded_once(gW, exact_gW, np.abs(exact_gW).max(), 100)


def test_a_product_of_float16_and_float32_is_float32_as_in_chainer():
    rng = np.random.default_rng(2)
    (a,), (b,) = random(rng, [(6, 5)]), random(rng, [(5, 4)], np.float32)
    for provider in ("chainer", "numpy"):
        y, (ga, gb) = run(F.matmul, [a, b], np.ones((6, 4)), provider)
        assert (y.dtype, ga.dtype, gb.dtype) == (np.float32, np.float16, np.float32)
