"""What makes a layer a scaled variant."""

from __future__ import annotations

from typing import Any, TypeVar

import chainer

from ada_loss.chainer.made_classes import become, made_class, picklable
from ada_loss.core.config import AdaLossConfig

Layer = TypeVar("Layer", bound=chainer.Link)

_VARIANTS: dict[type, type] = {}


class ScaledLayer:
    """Marks a layer class whose function is a decision point inside `AdaLossScaled`; outside it is itself."""

    ada_loss_config: AdaLossConfig | None = None
    """Settings of this layer alone; None for those of the scope."""

    def with_config(self: Layer, config: AdaLossConfig | None) -> Layer:
        """Give this layer settings of its own; returns the layer."""
        self.ada_loss_config = config
        return self

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
