"""The end of backward: what autograd stores in a leaf's `grad` is the true gradient, a plain tensor.

Of float16 leaves it is of float32: in float16 it might underflow.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

STORING = frozenset([aten.detach.default, aten.clone.default, aten.new_empty_strided.default])
"""What autograd calls on a gradient to store it, as it is or in the leaf's own memory format."""


def is_being_stored() -> bool:
    """Whether it is autograd that calls an operator, to store a gradient."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def stored(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """One of `STORING` for the true gradient, in the true gradient's dtype."""
    true = args[0].to_true()
    leaf = torch._C._current_autograd_node().variable
    if getattr(leaf, "grad_dtype", true.dtype) != true.dtype:
        leaf.grad_dtype = true.dtype  # so that others may assign to `grad` as well
    return func(true, *args[1:], **kwargs | ({"dtype": true.dtype} if "dtype" in kwargs else {}))
