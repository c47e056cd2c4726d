"""What makes a layer a scaled variant."""

from __future__ import annotations

import copyreg
from typing import Any, TypeVar

import chainer

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
        plain = next((base for base in cls.__bases__ if not issubclass(base, ScaledLayer)), None)
        if plain is not None:
            _VARIANTS.setdefault(plain, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made_from = type(self).__dict__.get("_made_from")
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if made_from is None or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new_variant, (made_from,), *reduced[2:])


def variant_class(plain: type) -> type:
    """The scaled variant of a layer class, made on first use for classes that are not Chainer's own."""
    if plain not in _VARIANTS:
        # Pickle finds a class that is made here by the one that it is made from.
        members = {"__module__": __name__, "__doc__": plain.__doc__, "_made_from": plain}
        type(f"AdaLoss{plain.__name__}", (ScaledLayer, plain), members)
    return _VARIANTS[plain]


def as_variant(layer: Layer) -> Layer:
    """Turn a layer into its scaled variant, in place: everything that refers to it refers to the variant."""
    if not isinstance(layer, ScaledLayer):
        layer.__class__ = variant_class(type(layer))
    return layer


def _new_variant(plain: type) -> Any:
    cls: Any = variant_class(plain)
    return cls.__new__(cls)
