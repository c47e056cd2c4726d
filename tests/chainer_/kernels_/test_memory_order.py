"""Arrays that lie in memory in several orders, as under the kernels torch, meet without changing any bit."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import kernels
from chainer_.kernels_.reference import EACH_PROVIDER
from twins import assert_exact

COMBINATIONS = {
    "inception": lambda m, h: F.concat([m.second(h), F.max_pooling_2d(h, 3, 1, 1)]),
    "averages": lambda m, h: F.concat([m.second(h), F.average_pooling_2d(h, 3, 1, 1)]),
    "split": lambda m, h: m.second(h)[:, :4] + F.split_axis(h, 2, axis=1)[1],
    "shuffled": lambda m, h: m.second(h) + F.transpose(h, (0, 1, 3, 2)),
    "reversed": lambda m, h: m.second(h) + h[..., ::-1],
    "three": lambda m, h: m.second(h) + F.max_pooling_2d(h, 3, 1, 1) + h * F.sigmoid(h),
    "reshaped": lambda m, h: F.relu(m.second(h)) + F.reshape(F.reshape(h, (len(h), -1)), h.shape),
}


class Net(chainer.Chain):
    def __init__(self, combine):
        super().__init__(
            first=L.Convolution2D(3, 8, 3, pad=1, initial_bias=0.1), second=L.Convolution2D(8, 8, 3, pad=1)
        )
        self.combine = combine

    def forward(self, x):
        return self.combine(self, self.first(x))


@EACH_PROVIDER
@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_gradients_in_float32_are_those_of_plain_chainer(provider, combine, rng):
    x = rng.standard_normal((4, 3, 8, 8)).astype(np.float32)
    with kernels.using(provider):
        assert_exact(Net(combine), [x], mixed16=None)


@EACH_PROVIDER
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gradients_of_parameters_lie_as_chainermn_needs_them(provider, dtype, rng):
    x = rng.standard_normal((4, 3, 8, 8)).astype(dtype)
    shapes = [(8, 3, 3, 3), (8, 2, 3, 3), (8,), (5, 8 * 8 * 8), (4, 8, 1, 1)]
    W, V, b, U, T = (chainer.Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
    with kernels.using(provider):
        h = F.relu(F.convolution_2d(x, W, b, pad=1))
        h = F.deconvolution_2d(F.convolution_2d(F.convolution_2d(h, V, pad=1, groups=4), T), T)
        F.sum(F.linear(h, U)).backward()
    assert all(parameter.grad.flags.c_contiguous for parameter in (W, V, b, U, T))
