"""Gradients of whole networks in float16 against those in float32."""

import pytest
import torch

import ada_loss.torch
from torch_.asserts import (
    assert_close,
    assert_plain_float32,
    float32_gradients,
    gradients_of,
    worst_signal_to_noise,
)
from torch_.nets import NETS, loss_of, make


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("exponent", [-60, -30, 0, 14])
def test_gradients_do_not_depend_on_the_size_of_the_loss(name, exponent):
    net, x, target = make(name)
    plain = float32_gradients(net, lambda: loss_of(net, x, target, exponent, float16=False).backward())

    with ada_loss.torch.backward():
        loss_of(net, x, target, exponent).backward()

    assert_plain_float32(net)
    actual = gradients_of(net)
    best = max(_with_fixed_scale(net, x, target, plain, exponent, scale) for scale in range(-8, 34, 6))
    assert_close(actual, plain, db=best - 1)


def _with_fixed_scale(net, x, target, plain, exponent, scale):
    """The worst signal-to-noise ratio of PyTorch's own gradients of a loss times 2**scale."""
    net.zero_grad()
    loss_of(net, x, target, scale).backward()
    scaled = {
        name: gradient.double() * 2.0 ** (exponent - scale) for name, gradient in gradients_of(net).items()
    }
    net.zero_grad()
    return worst_signal_to_noise(scaled, plain)[0]


def test_without_scales_such_a_loss_has_no_gradients():
    net, x, target = make("residual")
    loss_of(net, x, target, -30).backward()
    assert not any(p.grad.any() for n, p in net.named_parameters() if n.startswith("0."))


def test_scaler_gives_the_same_gradients_as_the_context():
    net, x, target = make("transformer")
    with ada_loss.torch.backward():
        loss_of(net, x, target, -30).backward()
    gradients = gradients_of(net)
    net.zero_grad()

    ada_loss.torch.GradScaler("cpu").scale(loss_of(net, x, target, -30)).backward()

    for name, gradient in gradients_of(net).items():
        assert torch.equal(gradient, gradients[name]), name
