"""Turns the layers of a model into scaled variants, and reports what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import chainer

from ada_loss.chainer.links import LAYERS, ScaledLayer, as_variant
from ada_loss.chainer.parameters import adopt
from ada_loss.config import AdaLossConfig

Filter = Callable[[str, chainer.Link], bool]
"""Says of a layer, given its path ("/extractor/conv1_1") and the link, whether to scale it."""

UNSCALED = AdaLossConfig(loss_scale_method="fixed")


@dataclass(frozen=True)
class Report:
    """What a transform did. converted: paths and class names of variants. left: paths of other layers, with the reason."""

    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{path}: {name}" for path, name in self.converted.items()]
        lines += [f"{path}: left, {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


def transform(link: chainer.Link, accept: Filter | None = None) -> tuple[Report, dict[str, AdaLossConfig]]:
    """Turn every layer below `link` that `accept` takes into its variant, in place.

    Layers keep their identity, parameters, hooks and names. Returns the report and the settings of those layers that
    have their own; what `accept` refuses is left as it is and is not scaled.
    """
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    configs: dict[str, AdaLossConfig] = {}
    for path, layer in named_links(link).items():
        if not isinstance(layer, LAYERS):
            if next(layer.params(include_uninit=True), None) is not None and not any(layer.children()):
                left[path] = f"{type(layer).__name__} is no decision point: the exponent passes through"
            continue
        if accept is not None and not accept(path, layer):
            left[path] = "refused by the filter"
            configs[path] = UNSCALED
            continue
        converted[path] = type(as_variant(layer)).__name__
        own = layer.ada_loss_config if isinstance(layer, ScaledLayer) else None
        if own is not None:
            configs[path] = own
    for parameter in link.params():
        adopt(parameter)
    return Report(converted, left), configs


def named_links(link: chainer.Link) -> dict[str, chainer.Link]:
    """Every link once, by its first path below `link`, "/" for `link` itself."""
    found: dict[int, tuple[str, chainer.Link]] = {}
    for path, child in link.namedlinks():
        found.setdefault(id(child), (path, child))
    return dict(found.values())
