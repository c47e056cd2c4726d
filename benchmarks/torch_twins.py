"""ResNet-20 and SSD300 once more, in PyTorch: the same layers, weights, loss and optimizer as their Chainer
models.

Modules are named as Chainer's links, so that weights carry over by their paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from workloads import CLASSES, LEARNING_RATE, Batch

import chainer  # isort: skip  (made importable by the workloads)
import torch
import torch.nn.functional as F
from chainer.backends import cuda
from torch import Tensor, nn

from loss import NEGATIVES_PER_POSITIVE
from optimization import BIAS_GRADIENT_FACTOR, MOMENTUM, WEIGHT_DECAY

PARAMETERS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias", "scale": "scale"}
"""PyTorch's names of Chainer's parameters."""

Loss = Callable[..., Tensor]
"""Of a module's outputs and a batch's targets."""


class ConvolutionBN(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(outputs, eps=2e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalization(self.convolution(x))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvolutionBN(inputs, outputs, stride=stride)
        self.second = ConvolutionBN(outputs, outputs)
        self.shortcut = ConvolutionBN(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet20(nn.Module):
    """Twin of `fidelity_cases.ResNet20` for images of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvolutionBN(3, 16)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Residual(*size) for size in sizes))
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(F.relu(self.first(x))).mean(dim=(2, 3)))


class Normalize(nn.Module):
    """Length 1 over the channels, times a factor for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=1, keepdim=True) + 1e-5) * self.scale[:, None, None]


class Extractor300(nn.Module):
    """The feature maps of ChainerCV's SSD300."""

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    added = ((256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0))

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for stage, widths in enumerate(self.stages, 1):
            for place, width in enumerate(widths, 1):
                self.add_module(f"conv{stage}_{place}", nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
        self.norm4 = Normalize(512)
        self.conv6 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024, 1024, 1)
        inputs = 1024
        for stage, (narrow, width, stride, pad) in enumerate(self.added, 8):
            self.add_module(f"conv{stage}_1", nn.Conv2d(inputs, narrow, 1))
            self.add_module(f"conv{stage}_2", nn.Conv2d(narrow, width, 3, stride, pad))
            inputs = width

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage, widths in enumerate(self.stages, 1):
            for place in range(1, len(widths) + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{place}")(x))
            if stage == 4:
                maps.append(self.norm4(x))
            # Chainer's pooling covers the whole input.
            x = F.max_pool2d(x, 2, ceil_mode=True) if stage < 5 else F.max_pool2d(x, 3, 1, 1)
        maps.append(F.relu(self.conv7(F.relu(self.conv6(x)))))
        for stage in range(8, 8 + len(self.added)):
            hidden = F.relu(self.get_submodule(f"conv{stage}_1")(maps[-1]))
            maps.append(F.relu(self.get_submodule(f"conv{stage}_2")(hidden)))
        return maps


class Multibox(nn.Module):
    """The heads on the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        boxes = list(zip((512, 1024, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4), strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(width, 4 * n, 3, padding=1) for width, n in boxes)
        self.conf = nn.ModuleList(nn.Conv2d(width, (CLASSES + 1) * n, 3, padding=1) for width, n in boxes)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self._joined(self.loc, maps, 4), self._joined(self.conf, maps, CLASSES + 1)

    def _joined(self, heads: nn.ModuleList, maps: list[Tensor], size: int) -> Tensor:
        found = [head(x).permute(0, 2, 3, 1) for head, x in zip(heads, maps, strict=True)]
        return torch.cat([y.reshape(len(y), -1, size) for y in found], dim=1)


class SSD300(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extractor = Extractor300()
        self.multibox = Multibox()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.multibox(self.extractor(images))


def multibox_loss(outputs: tuple[Tensor, Tensor], offsets: Tensor, labels: Tensor) -> Tensor:
    """Twin of the example's `MultiboxLoss`."""
    predicted, logits = (output.float() for output in outputs)
    labels = labels.long()
    positive = labels > 0
    with torch.no_grad():
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        rank = losses.masked_fill(positive, -1).argsort(dim=1, descending=True).argsort(dim=1)
        picked = positive | (rank < NEGATIVES_PER_POSITIVE * positive.sum(dim=1, keepdim=True))
    localization = F.huber_loss(predicted[positive], offsets[positive], reduction="sum")
    classification = F.cross_entropy(logits[picked], labels[picked], reduction="sum")
    return (localization + classification) / positive.sum().clamp(min=1)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels.long())


TWINS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "resnet20": (ResNet20, classification_loss),
    "ssd300": (SSD300, multibox_loss),
}
"""Module and loss by the name of the workload."""


class TorchTraining:
    """The training iteration of a twin, with the phases of `workloads.Training`.

    model: the Chainer model whose weights it takes over. half: in float16 by autocast, with GradScaler; else
    in float32.
    """

    def __init__(self, twin: str, model: chainer.Link, *, half: bool) -> None:
        build, self._loss = TWINS[twin]
        self._device = "cuda" if model.device.xp is cuda.cupy else "cpu"
        self.module = build().to(self._device)
        weights, biases = take_weights(self.module, model)
        groups = [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": biases, "lr": LEARNING_RATE * BIAS_GRADIENT_FACTOR},
        ]
        self._optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM)
        self._half = half
        self._scaler = torch.amp.GradScaler(self._device, enabled=half)
        self.skipped = 0

    def __call__(self, batch: Batch) -> Iterator[str]:
        loss = self.loss(batch)
        yield "forward"
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        yield "backward"
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.skipped += self._scaler.get_scale() < scale
        yield "update"

    def loss(self, batch: Batch) -> Tensor:
        inputs, *targets = map(as_tensor, batch)
        with torch.autocast(self._device, torch.float16, enabled=self._half):
            outputs = self.module(inputs)
        return self._loss(outputs, *targets)


def take_weights(module: nn.Module, model: chainer.Link) -> tuple[list[Any], list[Any]]:
    """Copy all parameters of a Chainer model; returns the module's, the biases of its layers apart."""
    found = dict(module.named_parameters())
    weights, biases = [], []
    for path, parameter in sorted(model.namedparams()):
        *links, name = path.strip("/").split("/")
        target = found.pop(".".join([*links, PARAMETERS[name]]))
        target.data.copy_(as_tensor(parameter.array))
        (biases if name == "b" else weights).append(target)
    if found:
        raise ValueError(f"The Chainer model has no {', '.join(found)}.")
    return weights, biases


def as_tensor(array: Any) -> Tensor:
    """The same memory as a tensor."""
    return torch.from_dlpack(array)
