"""Choosing a provider."""

import os
import subprocess
import sys
import threading
from unittest import mock

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.arrays import casting
from ada_loss.chainer import kernels
from ada_loss.chainer.kernels import dispatch
from ada_loss.chainer.kernels.providers import provider
from chainer_.kernels_.reference import HAS_TORCH, WITH_TORCH


@pytest.fixture(autouse=True)
def restore_the_provider_of_the_process():
    before = kernels.current()
    yield
    kernels.use(before)


def test_use_chooses_for_the_process():
    kernels.use("chainer")
    assert kernels.current() == "chainer"
    kernels.use("numpy")
    assert kernels.current() == "numpy"


def test_using_chooses_for_a_block_and_restores_what_was_there_before():
    kernels.use("chainer")
    with kernels.using("numpy"):
        assert kernels.current() == "numpy"
        with kernels.using("chainer"):
            assert kernels.current() == "chainer"
        assert kernels.current() == "numpy"
    assert kernels.current() == "chainer"


def test_using_restores_after_an_exception():
    kernels.use("chainer")
    with pytest.raises(KeyError), kernels.using("numpy"):
        raise KeyError
    assert kernels.current() == "chainer"


def test_use_within_a_block_takes_effect_after_it():
    kernels.use("chainer")
    with kernels.using("chainer"):
        kernels.use("numpy")
        assert kernels.current() == "chainer"
    assert kernels.current() == "numpy"


def test_a_block_in_one_thread_leaves_the_others_alone():
    kernels.use("chainer")
    seen, entered, looked = [], threading.Event(), threading.Event()

    def other():
        with kernels.using("numpy"):
            entered.set()
            looked.wait(10)
            seen.append(kernels.current())

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    assert kernels.current() == "chainer"
    looked.set()
    thread.join(10)
    assert seen == ["numpy"]


def test_an_unknown_name_is_one_clear_sentence_and_changes_nothing():
    before = kernels.current()
    with pytest.raises(ValueError, match="no kernels 'cuda': choose one of chainer, numpy, torch, auto"):
        kernels.use("cuda")
    with pytest.raises(ValueError, match="choose one of"), kernels.using(""):
        pass
    assert kernels.current() == before


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is installed")
def test_torch_without_pytorch_says_what_to_install():
    with pytest.raises(ImportError, match=r"install ada-loss\[torch\], or use the kernels 'numpy'"):
        kernels.use("torch")


def test_auto_is_the_best_that_is_installed():
    with kernels.using("auto"):
        assert kernels.current() == ("torch" if HAS_TORCH else "numpy")
    provider.cache_clear()
    try:
        with mock.patch("importlib.util.find_spec", lambda _: None):
            assert provider("auto").name == "numpy"
    finally:
        provider.cache_clear()


def test_methods_are_hooked_once_however_often_a_provider_is_chosen():
    kernels.use("numpy")
    hooks = provider("numpy").kernels
    methods = {hook: getattr(*hook) for hook in hooks}
    dispatch.install(hooks)
    kernels.use("chainer")
    kernels.use("numpy")
    assert all(getattr(*hook) is method for hook, method in methods.items())


def convnet_results(dtype, name):
    """Output and gradients of a small network with every kind of hooked function, under this provider."""
    rng = np.random.default_rng(0)
    x = chainer.Variable(rng.standard_normal((3, 4, 12, 12)).astype(dtype))
    with chainer.using_config("dtype", dtype), kernels.using(name):
        links = [
            L.Convolution2D(4, 6, 3, pad=1, initialW=1, initial_bias=0.5),
            L.BatchNormalization(6),
            L.Deconvolution2D(6, 4, 2, stride=2),
            L.Linear(None, 3),
        ]
        for link in links[:3]:
            for param in link.params():
                param.array[...] = rng.standard_normal(param.shape)
        conv, bn, deconv, linear = links
        h = F.max_pooling_2d(F.relu(bn(conv(x))), 2)
        h = F.average_pooling_2d(F.normalize(deconv(h) * 0.5 + 1), 2)
        y = linear(h) - 1
        linear.W.array[...] = rng.standard_normal(linear.W.shape)
        loss = F.sum(linear(h) / 3 + y * y)
        loss.backward()
    gradients = [param.grad for link in links for param in link.params()]
    return [loss.array, y.array, x.grad, *gradients]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float32_and_float64_keep_chainers_bits_under_numpy(dtype):
    np.random.seed(0)
    expected = convnet_results(dtype, "chainer")
    np.random.seed(0)
    actual = convnet_results(dtype, "numpy")
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(a, b)


def test_float16_follows_chainers_float32_under_numpy():
    np.random.seed(0)
    reference = convnet_results(np.float32, "chainer")
    np.random.seed(0)
    actual = convnet_results(np.float16, "numpy")
    for a, b in zip(actual[1:], reference[1:], strict=True):
        assert a.dtype == np.float16
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-2 * np.abs(b).max())


def test_float16_is_chainers_own_under_chainer():
    x = np.random.default_rng(1).standard_normal((50, 40)).astype(np.float16)
    with kernels.using("chainer"):
        y = F.sum(F.relu(x), axis=0).array
    np.testing.assert_array_equal(y, np.maximum(x, np.float16(0)).sum(axis=0))


@WITH_TORCH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float32_and_float64_agree_with_chainers_to_rounding_under_torch(dtype):
    np.random.seed(0)
    expected = convnet_results(dtype, "chainer")
    np.random.seed(0)
    actual = convnet_results(dtype, "torch")
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2e3 * np.finfo(dtype).eps * max(1, np.abs(b).max()))


def test_a_provider_casts_in_its_block_and_thread_only():
    cast_here = []

    def copy(source, out):
        cast_here.append(source.size)
        return False

    source = np.ones(5000, np.float32)
    block = dispatch.Provider("ours", copy=copy)
    leave = dispatch.enter(block)
    try:
        in_block = casting.to_float16(source)
        thread = threading.Thread(target=casting.to_float16, args=(source,))
        thread.start()
        thread.join(10)
    finally:
        leave()
    assert casting.to_float16(source).dtype == in_block.dtype == np.float16
    assert cast_here == [5000]


@WITH_TORCH
def test_torch_casts_under_torch_and_leaves_what_it_cannot_take():
    from ada_loss.chainer.kernels.on_torch import copy

    assert provider("torch").copy is copy
    assert provider("numpy").copy is provider("chainer").copy is None
    source, out = (
        np.random.default_rng(0).standard_normal(2000).astype(np.float32),
        np.zeros(2000, np.float16),
    )
    assert copy(source, out)
    np.testing.assert_array_equal(out, source.astype(np.float16))
    assert not copy(source[::-1], out)
    assert not copy(np.broadcast_to(source[0], 2000), out)
    np.testing.assert_array_equal(out, source.astype(np.float16))


FORKED = """
import os, signal
import ada_loss.chainer
import chainer.functions as F
import numpy as np
import torch
from ada_loss.arrays.casting import to_float16
from ada_loss.chainer import kernels

rng = np.random.default_rng(0)
x = rng.standard_normal((8, 16, 64, 64)).astype(np.float32)
W = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)


def results():
    return to_float16(x), F.convolution_2d(x, W).array, F.convolution_2d(to_float16(x), to_float16(W)).array


torch.set_num_threads(2)
kernels.use("torch")
before = results()
child = os.fork()
if not child:
    signal.alarm(30)
    same = [np.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(results(), before)]
    os._exit(0 if all(same) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
"""What PyTorch's threads did before a fork is done once more in the child, which ends itself if it waits."""


@WITH_TORCH
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_casts_and_convolves_under_torch_as_its_parent_did():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=100, check=True)


@WITH_TORCH
def test_torch_works_on_chainers_memory():
    from ada_loss.chainer.kernels.on_torch import _shared

    x = np.zeros((2, 3, 4, 4), np.float32)
    _shared(x).add_(1)
    assert (x == 1).all()
