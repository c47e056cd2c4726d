"""What every operator does with scaled tensors. One file for each kind of rule; `apply` finds the rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ada_loss.torch.operators import entries, fallback, in_place, leaf_gradients, views
from ada_loss.torch.operators import exits as exits  # these register their rules
from ada_loss.torch.operators import joins as joins
from ada_loss.torch.operators import linear as linear
from ada_loss.torch.operators import products as products
from ada_loss.torch.operators.registry import KINDS, RULES
from ada_loss.torch.scaled_tensor import ScaledTensor

__all__ = ["KINDS", "RULES", "apply", "begins_scaled", "fallback", "kind_of"]

begins_scaled = entries.begins_scaled


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns for arguments some of which are scaled."""
    if func in leaf_gradients.STORING and leaf_gradients.is_being_stored():
        return leaf_gradients.stored(func, args, kwargs)
    rule = RULES.get(func.overloadpacket)
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if _has_parts(func):
        return func.decompose(*args, **kwargs)
    if views.is_view(func):
        result = views.view(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if views.changes_shape(func):
        return views.change_shape(func, args, kwargs)
    if not _changes_arguments(func):
        return fallback.from_true_values(func, args, kwargs)
    functional = in_place.out_of_place(func)
    if functional is None:
        return fallback.changes_arguments(func, args, kwargs)
    fallback.write(args[0], functional(*args, **kwargs))
    return args[0]


def kind_of(func: Any) -> str:
    """What `apply` does with an operator, in a word or two; for the coverage table."""
    if func.overloadpacket in KINDS:
        return KINDS[func.overloadpacket]
    if _has_parts(func):
        return "parts"
    if views.is_view(func) or views.changes_shape(func):
        return "view"
    return "in place" if _changes_arguments(func) else "sees true values"


@cache
def _has_parts(func: Any) -> bool:
    """Whether an operator is made of others, which have rules."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _changes_arguments(func: Any) -> bool:
    return bool(func._schema.is_mutable)


ScaledTensor.apply_operator = staticmethod(apply)
