"""What every operator does with scaled tensors. One file for each kind of rule; `apply` finds the rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ada_loss.torch.operators import collectives, entries, fallback, in_place, leaf_gradients, views
from ada_loss.torch.operators import exits as exits  # these register their rules
from ada_loss.torch.operators import fused as fused
from ada_loss.torch.operators import joins as joins
from ada_loss.torch.operators import linear as linear
from ada_loss.torch.operators import products as products
from ada_loss.torch.operators.registry import KINDS, RULES, Rule
from ada_loss.torch.scaled_tensor import ScaledTensor

__all__ = ["KINDS", "RULES", "apply", "begins_scaled", "fallback", "kind_of"]

begins_scaled = entries.begins_scaled


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns for arguments some of which are scaled."""
    for rule in _rules_of(func):
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    raise AssertionError(f"No rule took {func}.")  # the last one takes everything


@cache
def _rules_of(func: Any) -> tuple[Rule, ...]:
    """The rules that an operator may follow; each takes the calls that those before it do not."""
    rules: list[Rule] = []
    if func in leaf_gradients.STORING:
        rules.append(leaf_gradients.store)
    if func.overloadpacket in RULES and not _writes_to_out(func):
        rules.append(RULES[func.overloadpacket])
    if (collective := collectives.rule_of(func)) is not None:
        rules.append(collective)
    if _has_parts(func):
        rules.append(_in_parts)
    if views.is_view(func):
        rules.append(views.view)
    if views.changes_shape(func):
        rules.append(views.change_shape)
    if in_place.out_of_place(func):
        rules.append(in_place.write_result)
    rules.append(fallback.changes_arguments if _changes_arguments(func) else fallback.from_true_values)
    return tuple(rules)


def _in_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func.decompose(*args, **kwargs)


def kind_of(func: Any) -> str:
    """What `apply` does with an operator, in a word or two; for the coverage table."""
    if func.overloadpacket in KINDS and not _writes_to_out(func):
        return KINDS[func.overloadpacket]
    if _has_parts(func):
        return "parts"
    if views.is_view(func) or views.changes_shape(func):
        return "view"
    return "in place" if _changes_arguments(func) else "sees true values"


def _has_parts(func: Any) -> bool:
    """Whether an operator is made of others, which have rules."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _writes_to_out(func: Any) -> bool:
    """Whether an overload writes its result to tensors given as `out`, of which rules know nothing."""
    return any(
        a.kwarg_only and a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
    )


def _changes_arguments(func: Any) -> bool:
    return bool(func._schema.is_mutable)


ScaledTensor.apply_operator = staticmethod(apply)
