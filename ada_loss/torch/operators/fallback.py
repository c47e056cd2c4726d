"""What no rule covers: computed from true values in float32, and scaled anew where the result is float16."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ada_loss.torch.operators.arguments import leaves, mapped, scaled_in, true
from ada_loss.torch.operators.results import entering
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import Shifts

IN_FLOAT32 = frozenset(
    getattr(torch.ops.aten, name)
    for name in "log log2 log10 log1p exp exp2 expm1 logcumsumexp logsumexp linalg_vector_norm norm".split()
)
"""Operators whose result stays in float32: they are not linear, and what they return need not be small where
their argument is."""

_warned: set[Any] = set()


def from_true_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operator that changes none of its arguments.

    Raises:
        RuntimeError: it reads what its forward pass has kept in float16, and only it can read.
    """
    if any(argument.name.lower().startswith("reserve") for argument in func._schema.arguments):
        raise RuntimeError(
            f"ada_loss has no rule for this call of {func}, and cannot compute it in float32: run this part "
            "of the model in float32."
        )
    shifts = scaled_in((args, kwargs))[0].shifts
    results = func(*mapped(true, args), **mapped(true, kwargs))
    tensors = [leaf for leaf in leaves(results) if isinstance(leaf, torch.Tensor)]
    if func.overloadpacket in IN_FLOAT32 or not any(tensor.is_floating_point() for tensor in tensors):
        return results
    dtypes = iter(_dtypes(func, args, kwargs, tensors))
    rescaled = False

    def finished(leaf: Any) -> Any:
        nonlocal rescaled
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dtype = next(dtypes)
        if dtype == leaf.dtype and dtype not in shifts.dtypes:
            return leaf
        rescaled = True
        return _as(leaf, dtype, shifts)

    results = mapped(finished, results)
    if rescaled:
        warn_of(func)
    return results


def warn_of(func: Any) -> None:
    """Once for an operator."""
    if func not in _warned:
        _warned.add(func)
        warnings.warn(
            f"ada_loss has no rule for {func}: its gradients are computed from true values in float32, "
            "which is right but slower.",
            stacklevel=2,
        )


def forget_warnings() -> None:
    """Warn of every operator again."""
    _warned.clear()


def _as(value: torch.Tensor, dtype: torch.dtype, shifts: Shifts) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_complex():
        return value
    if dtype in shifts.dtypes and value.is_floating_point():
        return entering(value, dtype, shifts)
    return value.to(dtype)


def _dtypes(func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> list[torch.dtype]:
    """What the results' dtypes would have been without widening, as far as the operator can tell without
    data."""
    try:
        outcome = func(*mapped(_without_data, args), **mapped(_without_data, kwargs))
    except Exception:  # whatever it is that this operator raises: there is another way
        wide = any(
            isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.dtype in (torch.float32, torch.float64)
            for leaf in leaves((args, kwargs))
        )
        return [torch.float16 if r.dtype == torch.float32 and not wide else r.dtype for r in results]
    return [leaf.dtype for leaf in leaves(outcome) if isinstance(leaf, torch.Tensor)]


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def written_by(func: Any) -> frozenset[str]:
    """Names of the arguments that an operator writes to, according to its schema."""
    arguments = func._schema.arguments
    return frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


def changes_arguments(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    writable: frozenset[str] | None = None,
    finish: Callable[[Any], None] | None = None,
) -> Any:
    """Any operator that writes to its arguments: it writes to true values, which are then written back.

    writable: names of those arguments, where the schema does not tell.
    finish: called with what the operator returns, where it may not have written everything yet.
    """
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    writable = written_by(func) if writable is None else writable
    names = [a.name for a in func._schema.arguments]

    def value_for(name: str, value: Any) -> Any:
        if name not in writable:
            return mapped(true, value)
        return mapped(_copied, value)

    def _copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        copy = true(leaf).clone() if isinstance(leaf, ScaledTensor) or leaf.dtype == torch.float16 else leaf
        written.append((leaf, copy))
        return copy

    arguments = [value_for(name, value) for name, value in zip(names, args, strict=False)]
    keywords = {name: value_for(name, value) for name, value in kwargs.items()}
    result = func(*arguments, **keywords)
    if finish is not None:
        finish(result)
    for original, copy in written:
        write(original, copy)
    originals = {id(copy): original for original, copy in written}
    return mapped(lambda leaf: originals.get(id(leaf), leaf), result)


def write(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write a plain or scaled value to a plain or scaled tensor in place."""
    if value is target:
        return
    if not isinstance(target, ScaledTensor):
        target.copy_(value.to_true() if isinstance(value, ScaledTensor) else value)
    elif isinstance(value, ScaledTensor):
        target.assign(value)
    else:
        target.assign(entering(value, target.dtype, target.shifts))
