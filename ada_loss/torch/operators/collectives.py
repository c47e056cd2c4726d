"""Collectives of `torch.distributed` within backward: processes exchange true gradients, in float32.

Each process has scales of its own, so scaled data cannot be added up between them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ada_loss.torch.operators.arguments import leaves, mapped, scaled_in, true
from ada_loss.torch.operators.fallback import changes_arguments, written_by
from ada_loss.torch.operators.registry import Rule
from ada_loss.torch.operators.results import entering
from ada_loss.torch.scaled_tensor import ScaledTensor


def rule_of(func: Any) -> Rule | None:
    """The rule of a collective; None for other operators. PyTorch registers collectives at any time."""
    if func.namespace in ("_c10d_functional", "_c10d_functional_autograd"):
        return _in_place if func._schema.is_mutable else _functional
    return _in_place if func.namespace in ("c10d", "fsdp") else None


@cache
def packs_gradients(func: Any) -> bool:
    """Whether an operator puts gradients into the buffer that FSDP2 reduces, in the buffer's dtype."""
    return bool(func.namespace == "fsdp" and func._schema.name.endswith("chunk_cat"))


def refuse_rounding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Look for plain tensors of float16 among those that a collective writes to.

    Raises:
        RuntimeError: there is one.
    """
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    for leaf in leaves([given.get(name) for name in _written_by(func)]):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, ScaledTensor):
            if leaf.dtype == torch.float16:
                raise RuntimeError(
                    f"{func} would exchange gradients between processes in float16, without a scale: give "
                    "it float32; with FSDP2 that is MixedPrecisionPolicy(reduce_dtype=torch.float32)."
                )


def _written_by(func: Any) -> frozenset[str]:
    """Names of the arguments that a collective may write to; those of c10d declare none of them."""
    if func.namespace == "c10d":
        return frozenset(argument.name for argument in func._schema.arguments)
    return written_by(func)


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A collective that writes what it receives to its arguments: it is over when this returns."""
    refuse_rounding(func, args, kwargs)
    return changes_arguments(func, args, kwargs, _written_by(func), _wait)


def _wait(result: Any) -> None:
    """For the work that collectives return; its future then holds true values, as its readers expect."""
    for leaf in leaves(result):
        if isinstance(leaf, torch.ScriptObject) and hasattr(leaf, "wait"):
            leaf.wait()


def _functional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A collective that returns what it is going to receive: waited for before it is scaled."""
    wait = torch.ops._c10d_functional.wait_tensor
    if func.overloadpacket is wait:
        return args[0]
    shifts = scaled_in((args, kwargs))[0].shifts
    results = func(*mapped(true, args), **mapped(true, kwargs))
    return mapped(lambda result: entering(wait(result), torch.float16, shifts), results)
