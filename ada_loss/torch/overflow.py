"""Which layer a step's gradients stopped being finite at; looked for only after a step was skipped."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch


def where_it_began(parameters: Sequence[torch.Tensor]) -> str:
    """The end of a sentence on a skipped step: the gradient that is the first on the way back not to be
    finite.

    Backward goes through a model against the order of its layers, so that this is the last one in that order.

    Args:
        parameters: those of the optimizer, with their gradients.
    """
    names = _names_of(parameters)
    graded = [p for p in parameters if p.grad is not None]
    bad = [p for p, finite in zip(graded, _finite(graded), strict=True) if not finite]
    named = [name for key, name in names.items() if key in {id(p) for p in bad}]
    if named:
        return f"on the way back the gradient of {named[-1]!r} is the first that is not finite"
    if not bad:
        return "another process has a gradient that is not finite"
    shape = tuple(bad[-1].shape)
    return f"the gradient of a parameter of shape {shape} is not finite"


def _finite(parameters: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each parameter's gradient is; devices are waited for once."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        # Of a sharded gradient, what this process has: to ask the others would mean waiting for them.
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        values = local._values() if local.is_sparse else local
        found.append(torch.isfinite(values).all().to("cpu", non_blocking=True))
    if any(parameter.is_cuda for parameter in parameters):
        torch.cuda.synchronize()
    return [bool(finite) for finite in found]


def _names_of(parameters: Sequence[torch.Tensor]) -> dict[int, str]:
    """Names by identity, in the order of their models' layers, as far as a module that is alive has them."""
    wanted = {id(parameter) for parameter in parameters}
    best: dict[int, str] = {}
    for module in [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]:
        names = {id(p): name for name, p in module.named_parameters() if id(p) in wanted}
        # The outermost module knows the most parameters, or the same ones by longer names.
        if (len(names), sum(map(len, names.values()))) > (len(best), sum(map(len, best.values()))):
            best = names
    return best
