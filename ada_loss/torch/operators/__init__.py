"""What every operator does with scaled tensors. One file for each kind of rule; `apply` finds the rule."""

from __future__ import annotations

from functools import cache
from typing import Any

from ada_loss.torch.operators import (
    exits,
    fallback,
    in_place,
    joins,
    leaf_gradients,
    linear,
    products,
    views,
)
from ada_loss.torch.operators.registry import KINDS, RULES

__all__ = ["KINDS", "RULES", "apply", "enter", "exits", "is_entry", "joins", "linear", "products"]

enter, is_entry = exits.enter, exits.is_entry


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns for arguments some of which are scaled."""
    if func in leaf_gradients.STORING and leaf_gradients.is_being_stored():
        return leaf_gradients.stored(func, args, kwargs)
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


@cache
def _changes_arguments(func: Any) -> bool:
    return bool(func._schema.is_mutable)
