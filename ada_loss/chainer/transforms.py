"""Turns the layers of a model into scaled variants, and reports what it did."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import chainer

from ada_loss.chainer.links import LAYERS, as_variant


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


def transform(links: Mapping[str, chainer.Link], refused: Container[str] = ()) -> Report:
    """Turn layers into their variants, in place, but for those whose path is refused; says what was done.

    Layers keep their identity, parameters, hooks and names. links: those of a model, by path.
    """
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, layer in links.items():
        if not layer._params:
            continue
        if path in refused:
            left[path] = "refused by the filter"
        elif isinstance(layer, LAYERS):
            converted[path] = type(as_variant(layer)).__name__
        else:
            left[path] = (
                f"{type(layer).__name__} is no layer with a variant: only functions in it are decision points"
            )
    return Report(converted, left)
