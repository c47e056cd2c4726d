"""Assertions that the tests share."""

from __future__ import annotations

import math

import torch


def gradients_of(net):
    """Copies of the gradients of a network's parameters, by name."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in net.named_parameters()
    }


def float32_gradients(net, backward):
    """The gradients that `backward` leaves in a network; they are taken away again."""
    net.zero_grad()
    backward()
    gradients = gradients_of(net)
    net.zero_grad()
    return gradients


def signal_to_noise(actual, reference):
    """10 log10 of the reference's power over that of the difference, in dB; infinite where they are equal."""
    actual, reference = actual.double(), reference.double()
    if not torch.isfinite(actual).all():
        return -math.inf
    noise = (actual - reference).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(reference.square().sum() / noise))


def worst_signal_to_noise(actual, reference):
    """The smallest over gradients by name, and the name."""
    assert actual.keys() == reference.keys()
    return min((signal_to_noise(actual[name], reference[name]), name) for name in reference)


def assert_close(actual, reference, *, db):
    """Every gradient reaches a signal-to-noise ratio of `db`."""
    worst, name = worst_signal_to_noise(actual, reference)
    assert worst >= db, (worst, name)


def assert_same_bits(actual, reference):
    """Gradients by name are equal bit for bit."""
    assert actual.keys() == reference.keys()
    for name, gradient in reference.items():
        assert type(actual[name]) is type(gradient), name
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_plain_float32(net):
    """Every gradient of a network is a plain tensor of float32."""
    for name, parameter in net.named_parameters():
        assert type(parameter.grad) is torch.Tensor and parameter.grad.dtype == torch.float32, name
