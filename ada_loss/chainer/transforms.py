"""Turns the layers of a model into scaled variants, and reports what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import chainer

from ada_loss.chainer.links import LAYERS, as_variant
from ada_loss.chainer.parameters import adopt
from ada_loss.chainer.tagging import named_links
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.rules import FIXED

Filter = Callable[[str, chainer.Link], bool]
"""Says of a link, given its path ("/extractor/conv1_1") and the link, whether to scale it."""

UNSCALED = AdaLossConfig(loss_scale_method=FIXED.name)


@dataclass(frozen=True)
class Report:
    """What a transform did.

    converted: paths and class names of variants. left: paths of other links that have parameters, with the
    reason.
    """

    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{path}: {name}" for path, name in self.converted.items()]
        lines += [f"{path}: left, {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


def transform(link: chainer.Link, accept: Filter | None = None) -> tuple[Report, dict[str, AdaLossConfig]]:
    """Turn every layer from `link` downwards that `accept` takes into its variant, in place.

    Layers keep their identity, parameters, hooks and names. `accept` is asked about every link with
    parameters of its own; products and casts in a link that it refuses are not scaled. Returns the report and
    those links' settings.
    """
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    refused: dict[str, AdaLossConfig] = {}
    for path, layer in named_links(link).items():
        if not layer._params:
            continue
        if accept is not None and not accept(path, layer):
            left[path] = "refused by the filter"
            refused[path] = UNSCALED
        elif isinstance(layer, LAYERS):
            converted[path] = type(as_variant(layer)).__name__
        else:
            left[path] = (
                f"{type(layer).__name__} is no layer with a variant: only functions in it are decision points"
            )
    for parameter in link.params():
        adopt(parameter)
    return Report(converted, left), refused
