"""What every operator does with scaled tensors. One file for each kind of rule; `apply` finds the rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ada_loss.torch.operators import exits, fallback, in_place, joins, linear, products, views
from ada_loss.torch.operators.registry import KINDS, RULES

__all__ = ["KINDS", "RULES", "apply", "enter", "exits", "is_entry", "joins", "linear", "products"]

enter, is_entry = exits.enter, exits.is_entry


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns for arguments some of which are scaled."""
    if _keeps_for_good(func):
        return func(args[0].to_true(), *args[1:], **kwargs)
    rule = RULES.get(func.overloadpacket)
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if views.is_view(func):
        result = views.view(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if not _changes_arguments(func):
        return fallback.from_true_values(func, args, kwargs)
    functional = in_place.out_of_place(func)
    if functional is None:
        return fallback.changes_arguments(func, args, kwargs)
    fallback.write(args[0], functional(*args, **kwargs))
    return args[0]


def _keeps_for_good(func: Any) -> bool:
    """Whether this is autograd storing a gradient in a leaf's `grad`, which has to be the true one."""
    if func is not torch.ops.aten.detach.default and func is not torch.ops.aten.clone.default:
        return False
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


@cache
def _changes_arguments(func: Any) -> bool:
    return bool(func._schema.is_mutable)
