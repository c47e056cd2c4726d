"""The detectors: ChainerCV's SSD300 and SSD512 as they are, and a small SSD that two CPU cores can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import initializers
from chainercv.links import SSD300, SSD512
from chainercv.links.model.ssd import SSD, Multibox

from coding import VARIANCES

# GluonCV's Xavier(rnd_type='gaussian', magnitude=2, factor_type='out'): standard deviation sqrt(2 / fan_out);
# its Uniform() and Normal() with their default ranges.
INITIALIZERS: dict[str, Callable[[], chainer.Initializer]] = {
    "lecun-uniform": initializers.LeCunUniform,
    "xavier": lambda: initializers.HeNormal(fan_option="fan_out"),
    "uniform": lambda: initializers.Uniform(scale=0.07),
    "normal": lambda: initializers.Normal(scale=0.01),
}
FIRST_ADDED_BLOCK = 8
# In each cell of the first feature map, of all models here.
BOXES_IN_FIRST_CELLS = 4


class SmallExtractor(chainer.Chain):
    """A VGG-like stack for images of 96x96; gives feature maps of 12x12, 6x6 and 3x3.

    Its input is RGB with the mean subtracted, (B, 3, 96, 96); it scales that to about unit variance itself.
    """

    insize = 96
    grids = (12, 6, 3)
    input_scale = 1 / 64

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = _convolution(3, 24, stride=2)
            self.conv2 = _convolution(24, 32)
            self.conv3_1 = _convolution(32, 64)
            self.conv3_2 = _convolution(64, 64)
            self.conv4_1 = _convolution(64, 96)
            self.conv4_2 = _convolution(96, 96)
            self.conv5 = _convolution(96, 128)
            self.conv6 = _convolution(128, 128)

    def forward(self, x: chainer.Variable) -> list[chainer.Variable]:
        h = F.relu(self.conv1(x * self.input_scale))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3_1(F.max_pooling_2d(h, 2)))
        h = F.relu(self.conv3_2(h))
        h = F.relu(self.conv4_1(F.max_pooling_2d(h, 2)))
        maps = [F.relu(self.conv4_2(h))]
        for convolution in (self.conv5, self.conv6):
            maps.append(F.relu(convolution(F.max_pooling_2d(maps[-1], 2))))
        return maps


class SmallSSD(SSD):
    """ChainerCV's SSD on `SmallExtractor`, for objects of about 12 to 70 pixels."""

    def __init__(self, n_fg_class: int) -> None:
        super().__init__(
            extractor=SmallExtractor(),
            multibox=Multibox(n_class=n_fg_class + 1, aspect_ratios=((2,), (2,), (2,))),
            steps=(8, 16, 32),
            sizes=(20, 32, 48, 72),
            mean=np.array((120, 120, 120)).reshape(-1, 1, 1),
        )


@dataclass(frozen=True)
class ModelKind:
    """A detector that can be named on the command line.

    Attributes:
        build: makes one with random weights, given the number of classes without the background.
        on_vgg: whether it starts with VGG-16, for which there are weights trained on ImageNet.
    """

    build: Callable[[int], SSD]
    on_vgg: bool


MODELS = {
    "small": ModelKind(SmallSSD, on_vgg=False),
    "ssd300": ModelKind(SSD300, on_vgg=True),
    "ssd512": ModelKind(SSD512, on_vgg=True),
}


def build_model(
    name: str, n_fg_class: int, initializer: str, seed: int, variances: tuple[float, float] = VARIANCES
) -> SSD:
    """A detector with all its parameters initialized, in Chainer's dtype of the moment.

    The same seed gives the same weights. `initializer` (see INITIALIZERS) fills the layers that SSD adds to
    its backbone; `variances` are those of its default boxes.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        model = MODELS[name].build(n_fg_class)
        model.coder._variance = variances
        for convolution in added_layers(model):
            convolution.W.initializer = INITIALIZERS[initializer]()
        _initialize(model)
    finally:
        np.random.set_state(state)
    return model


def added_layers(model: SSD) -> Iterator[L.Convolution2D]:
    """The convolutions that SSD puts on top of its backbone: the extra feature maps and the heads."""
    for name, link in model.extractor.namedlinks(skipself=True):
        if name.startswith("/conv") and int(name[len("/conv") :].split("_")[0]) >= FIRST_ADDED_BLOCK:
            yield link
    yield from model.multibox.loc.children()
    yield from model.multibox.conf.children()


def input_dtype(model: chainer.Link) -> np.dtype:
    """What a model's images are cast to: the dtype of its parameters."""
    return next(param for _, param in sorted(model.namedparams())).dtype


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> L.Convolution2D:
    return L.Convolution2D(in_channels, out_channels, 3, stride, pad=1, initialW=initializers.HeNormal())


def _initialize(model: SSD) -> None:
    # ChainerCV's layers take their shapes from the first input.
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        model(np.zeros((1, 3, model.insize, model.insize), dtype=chainer.get_dtype()))
    if not all(np.isfinite(param.array).all() for param in model.params()):
        raise FloatingPointError(f"initial weights overflow {chainer.get_dtype()}")


def parameter_count(model: chainer.Link) -> int:
    return sum(math.prod(param.shape) for param in model.params())
