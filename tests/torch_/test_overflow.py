"""A skipped step says where its gradients stopped being finite."""

import logging

import pytest
import torch
from torch import nn

from ada_loss.torch import GradScaler
from ada_loss.torch.overflow import where_it_began
from torch_.nets import make


class Model(nn.Module):
    """The gradient overflows between two of its layers."""

    def __init__(self, after=1):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.after = after

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == self.after and x.requires_grad:
                x.register_hook(lambda gradient: gradient * float("inf"))
        return x


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("half", [False, True])
def test_the_layer_is_named(caplog, after, half):
    model, x = Model(after), torch.randn(4, 8)
    if half:
        model, x = model.half(), x.half()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), GradScaler("cpu")
    with torch.autocast("cpu", torch.float16, enabled=not half):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    with caplog.at_level(logging.WARNING):
        scaler.step(optimizer)
    assert f"the gradient of 'layers.{after}.bias' is the first that is not finite" in caplog.text


def test_a_parameter_without_a_module_has_its_shape():
    parameter = torch.zeros(2, 3, requires_grad=True)
    parameter.grad = torch.full((2, 3), float("nan"))
    assert where_it_began([parameter]) == "the gradient of a parameter of shape (2, 3) is not finite"


def test_nothing_is_looked_for_while_steps_are_taken(monkeypatch):
    net, x, target = make("transformer")
    monkeypatch.setattr("ada_loss.torch.grad_scaler.where_it_began", None)
    scaler, optimizer = GradScaler("cpu"), torch.optim.SGD(net.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = net(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.skipped == 0
