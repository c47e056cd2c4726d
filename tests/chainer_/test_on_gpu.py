"""Gradients and updates of a whole model on a GPU; skipped where there is none."""

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer.backends.cuda import to_cpu as on_host

from ada_loss.chainer import AdaLossScaled, kernels
from ada_loss.core.config import TIMINGS
from chainer_.test_as_on_gpu import METHODS, Net, images
from helpers import dtype, signal_to_noise
from toy import prepared

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(not cupy.cuda.is_available(), reason="There is no GPU.")

DEVICE = "@cupy:0"
RATE = 1e-4
DECIBEL = 15
"""What is left where rounding makes a unit of a small network turn the other way."""


@pytest.fixture(params=["chainer", "torch"])
def provider(request):
    """Whose kernels compute."""
    if request.param == "torch":
        pytest.importorskip("torch")
    with kernels.using(request.param):
        yield request.param


def on_gpu(plain, method, timing):
    """A wrapped mixed16 model on the GPU with the weights of a float32 one on the CPU."""
    with dtype("mixed16"):
        model = AdaLossScaled(Net(), method, timing=timing)
    for ours, theirs in zip(model.params(), plain.params(), strict=True):
        ours.array = theirs.array.astype(ours.dtype)
        theirs.array = ours.array.astype(np.float32)
    model.to_device(DEVICE)
    return model


def step(model, x):
    model.cleargrads()
    results = model(x)
    sum(F.sum(F.square(F.cast(result, np.float32))) for result in results).backward()


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_follow_float32_on_the_cpu(rng, provider, method, timing):
    plain = Net()
    model = on_gpu(plain, method, timing)
    x = images(rng).astype(np.float16)
    with kernels.using("chainer"):
        step(plain, x.astype(np.float32))
    expected = {path: parameter.grad for path, parameter in plain.namedparams()}
    norms = {path: np.linalg.norm(gradient) for path, gradient in expected.items()}
    for _ in range(3):
        step(model, cupy.asarray(x))
        for path, parameter in model.namedparams():
            # What is next to nothing beside others is noise in float32 as well.
            if norms[path] > 1e-3 * max(norms.values()):
                assert signal_to_noise(on_host(parameter.grad), expected[path]) > DECIBEL, path


@pytest.mark.parametrize("method", METHODS)
def test_updates_follow_those_on_the_cpu(rng, provider, method):
    plain = Net()
    model = on_gpu(plain, method, "delayed")
    optimizers = [chainer.optimizers.SGD(RATE).setup(plain), prepared(model, chainer.optimizers.SGD(RATE))]
    before = {path: parameter.array.copy() for path, parameter in plain.namedparams()}
    for _ in range(3):
        x = images(rng).astype(np.float16)
        with kernels.using("chainer"):
            step(plain, x.astype(np.float32))
        step(model, cupy.asarray(x))
        for optimizer in optimizers:
            optimizer.update()
    assert optimizers[1].entry_scale.skipped == 0
    found = dict(model.namedparams())
    for path, parameter in plain.namedparams():
        moved = np.linalg.norm(parameter.array - before[path])
        ours = found[path].array if found[path].master is None else found[path].master
        assert np.linalg.norm(on_host(ours) - parameter.array) < 0.2 * moved + 1e-6, path
