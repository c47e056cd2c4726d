"""Backward computes on the device from beginning to end: where there are no numbers to read, it still
runs."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ada_loss.torch import AdaLossConfig, GradScaler, backward
from torch_.nets import NETS, cross_entropy, make

METHODS = ["auto", "approx_range", "abs_range", "fixed"]


def loss_on(device, name):
    net, x, target = make(name)
    if device != "cpu":
        net, x, target = net.to(device), x.to(device), target.to(device)
    with torch.autocast(device, torch.float16):
        return net, cross_entropy(net(x), target) * 2.0**-30


def half_on_meta(name):
    """Autocast does not know the meta device."""
    net, x, target = make(name)
    net, x, target = net.half().to("meta"), x.to("meta"), target.to("meta")
    x = x.half() if x.is_floating_point() else x
    return net, cross_entropy(net(x), target)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_on_the_meta_device(name, method):
    net, loss = half_on_meta(name)
    with backward(AdaLossConfig(loss_scale_method=method)) as mode:
        loss.backward()
    assert mode.entered
    assert all(p.grad.dtype == torch.float32 and p.grad.is_meta for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_with_fake_tensors(name, method):
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, loss = loss_on("cpu", name)
        with backward(AdaLossConfig(loss_scale_method=method)) as mode:
            loss.backward()
        assert mode.entered and all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_the_scaler_up_to_the_step():
    net, loss = half_on_meta("residual")
    scaler = GradScaler("cpu")
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(net.parameters(), 0.1))


def test_this_would_notice():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NETS)
def test_on_a_gpu(name):
    net, loss = loss_on("cuda", name)
    scaler = GradScaler()
    scaled = scaler.scale(loss)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        scaled.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
