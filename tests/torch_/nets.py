"""Small networks that the tests share, and their losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResidualNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class Transformer(nn.Module):
    def __init__(self, width=32, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.out = nn.Linear(width, 50)

    def forward(self, tokens):
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.out(h)


class Recurrent(nn.Module):
    """A GRU and an LSTM cell; PyTorch has no float16 kernel for whole LSTM layers on every CPU."""

    def __init__(self, width=24):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.gru, self.lstm = nn.GRUCell(width, width), nn.LSTMCell(width, width)
        self.out = nn.Linear(width, 50)

    def forward(self, tokens):
        embedded = self.embedding(tokens)
        h = g = c = embedded.new_zeros(embedded.shape[0], embedded.shape[2])
        outs = []
        for x in embedded.unbind(1):
            g = self.gru(x, g)
            h, c = self.lstm(g, (h, c))
            outs.append(h)
        return self.out(torch.stack(outs, 1))


NETS = {"residual": ResidualNet, "transformer": Transformer, "recurrent": Recurrent}


def make(name):
    """A network with weights that float16 holds, its input and its target."""
    net = NETS[name]()
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float()
    if name == "residual":
        return net, torch.randn(8, 3, 16, 16).half().float(), torch.randint(0, 10, (8,))
    return net, torch.randint(0, 50, (4, 8)), torch.randint(0, 50, (4, 8))


def cross_entropy(output, target):
    output = output.float()
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def loss_of(net, x, target, exponent=0, *, float16=True):
    """The loss times 2**exponent, under autocast or in float32."""
    with torch.autocast("cpu", torch.float16, enabled=float16):
        return cross_entropy(net(x), target) * 2.0**exponent
