"""Fan-outs of a scaled model, as its first forward pass shows them: where gradients are aligned and added."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import chainer

from ada_loss.chainer.functions.branch import Branch
from ada_loss.chainer.tagging import tag_of

INPUT = "(input)"
"""Stands for a variable that comes from outside the model."""


@dataclass(frozen=True)
class FanOut:
    """A variable that is used more than once.

    path: the link that applied the function that made it, or `INPUT`. function: the label of that function,
    "" for an input. layer: the site of the nearest decision point before it, "" where there is none. uses:
    how often it is used.
    """

    path: str
    function: str
    layer: str
    uses: int

    def __str__(self) -> str:
        made_by = f"{self.path} {self.function}".rstrip()
        after = f" after {self.layer}" if self.layer not in ("", self.path) else ""
        return f"{made_by}{after}, used {self.uses} times"


def find_fan_outs(applied: list[tuple[Any, str]]) -> tuple[FanOut, ...]:
    """The fan-outs among functions, given in the order of their application with the paths of their links.

    Shared parameters are none: their gradients are added as well, but nothing branches off there.
    """
    paths = dict(applied)
    uses = Counter(node for function in paths for node in function.inputs or () if node.requires_grad)
    found = [
        FanOut(path, function.label, _layer_before(function), function.n)
        for function, path in applied
        if isinstance(function, Branch)
    ]
    for node, count in uses.items():
        if count > 1 and not isinstance(node.get_variable_or_none(), chainer.Parameter):
            maker = node.creator_node
            inside = maker in paths
            path, label = (paths[maker], maker.label) if inside else (INPUT, "")
            found.append(FanOut(path, label, _layer_before(maker) if inside else "", count))
    return tuple(found)


def _layer_before(function: Any) -> str:
    """The path of the nearest decision point from `function` on upstream, by first inputs."""
    while function is not None and (tag := tag_of(function)) is not None:
        if tag.point is not None:
            return tag.point.site.path
        function = function.inputs[0].creator_node if function.inputs else None
    return ""
