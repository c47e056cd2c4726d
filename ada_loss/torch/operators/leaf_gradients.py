"""The end of backward: what autograd stores in a leaf's `grad` is the true gradient, a plain tensor.

Of float16 leaves it is of float32: in float16 it might underflow.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

STORING = frozenset([aten.detach.default, aten.clone.default, aten.new_empty_strided.default])
"""What autograd calls on a gradient to store it, as it is or in the leaf's own memory format."""


def store(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of `STORING` for the true gradient, in its dtype, if it is autograd that calls it to store a
    gradient."""
    node = torch._C._current_autograd_node()
    if node is None or node.name() != "torch::autograd::AccumulateGrad":
        return NotImplemented
    true, leaf = args[0].to_true(), node.variable
    if getattr(leaf, "grad_dtype", true.dtype) != true.dtype:
        leaf.grad_dtype = true.dtype  # so that others may assign to `grad` as well
    return func(true, *args[1:], **kwargs | ({"dtype": true.dtype} if "dtype" in kwargs else {}))
