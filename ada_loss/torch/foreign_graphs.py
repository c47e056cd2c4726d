"""Compiled backward graphs that do not scale: a dispatch mode cannot look into them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

_COMPILED = "CompiledFunctionBackward"
_COMPILER = "torch._functorch._aot_autograd.runtime_wrappers"
_KEY = "ada_loss scales"


def mark_as_scaling(result: Any) -> None:
    """Mark the compiled graph that a result comes from as one with scales."""
    node = result.grad_fn if isinstance(result, torch.Tensor) else None
    if node is not None and node.name() == _COMPILED:
        node.metadata[_KEY] = True


def refuse_foreign_graphs(outputs: Iterable[torch.Tensor]) -> None:
    """Look for compiled graphs without scales among all that backward will go through.

    Raises:
        RuntimeError: there is one.
    """
    if _COMPILER not in sys.modules:
        return
    waiting = [output.grad_fn for output in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == _COMPILED and _KEY not in node.metadata:
            raise RuntimeError(
                "This model was compiled by a backend whose backward pass does not scale float16 gradients: "
                "use torch.compile(model, backend=ada_loss.torch.backend)."
            )
        waiting += [parent for parent, _ in node.next_functions]
