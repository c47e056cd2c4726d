"""Which rule an operator has, and how a call with scaled tensors finds it.

A rule takes an operator and its arguments and returns its result, or NotImplemented where it does not cover
the call. What no rule covers is computed from true values (`fallback`), so a missing rule costs time, never a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Any, Rule] = {}
"""By operator (an overload packet: rules do not tell overloads apart)."""

KINDS: dict[Any, str] = {}
"""What kind of rule an operator has, by operator; for the coverage table."""


def register(kind: str, rule: Rule, *names: str) -> None:
    """Give the operators of these names, such as "aten.mm", a rule. Versions of PyTorch differ in which they
    have."""
    for name in names:
        namespace, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            if packet in RULES:
                raise ValueError(f"{name} has a rule already.")
            RULES[packet] = rule
            KINDS[packet] = kind


def implements(kind: str, *names: str) -> Callable[[Rule], Rule]:
    """`register`, as a decorator."""

    def decorate(rule: Rule) -> Rule:
        register(kind, rule, *names)
        return rule

    return decorate
