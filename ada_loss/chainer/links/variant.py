"""What makes a layer a scaled variant."""

from __future__ import annotations

from typing import Any, TypeVar

import chainer
import numpy as np

from ada_loss.chainer.made_classes import become, made_class, picklable
from ada_loss.chainer.settings import require_config
from ada_loss.core.config import AdaLossConfig

Layer = TypeVar("Layer", bound=chainer.Link)

_VARIANTS: dict[type, type] = {}


class ScaledLayer:
    """Marks a layer class whose function is a decision point inside `AdaLossScaled`; outside it is itself."""

    ada_loss_config: AdaLossConfig | None = None
    """Settings of this layer alone; None for those of the scope."""

    def with_config(self: Layer, config: AdaLossConfig | None) -> Layer:
        """Give this layer settings of its own; returns the layer."""
        require_config(config)
        self.ada_loss_config = config
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = super().forward  # type: ignore[misc]
        # What a subclass does with its input is its own business.
        if own.__func__.__module__.startswith("chainer."):
            args = tuple(_fitting(x, self) for x in args)
            kwargs = {name: _fitting(x, self) for name, x in kwargs.items()}
        return own(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain = [base for base in cls.__bases__ if not issubclass(base, ScaledLayer)]
        if ScaledLayer in cls.__bases__ and plain:
            _VARIANTS.setdefault(plain[0], cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return *picklable(*reduced[:2]), *reduced[2:]


def variant_class(plain: type) -> type:
    """The scaled variant of a layer class, made on first use for classes that are not Chainer's own."""
    return _VARIANTS.get(plain) or made_class(ScaledLayer, plain)


def as_variant(layer: Layer) -> Layer:
    """Turn a layer into its scaled variant, in place: everything that refers to it refers to the variant."""
    if not isinstance(layer, ScaledLayer):
        become(layer, variant_class(type(layer)))
    return layer


def _fitting(x: Any, layer: Any) -> Any:
    """An input in the format of the layer's weights, where one of the two is float16 and the other wider."""
    dtype = getattr(x, "dtype", None)
    if not isinstance(dtype, np.dtype) or dtype.kind != "f":
        return x
    weights = _dtype_of(layer.W)
    # F.cast would add a function to the graph even where there is nothing to do.
    fits = dtype == weights or np.float16 not in (dtype, weights)
    return x if fits else chainer.functions.cast(x, weights)


def _dtype_of(weights: chainer.Variable) -> np.dtype[Any]:
    """The format that weights have, or will have once they are initialized."""
    if weights.array is not None:
        return weights.dtype
    own = getattr(weights.initializer, "dtype", None)
    return np.dtype(chainer.get_dtype(own, map_mixed16=np.float16))
