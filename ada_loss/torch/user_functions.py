"""Autograd functions whose backward pass reads memory by address: kernels of Triton, C++ or CUDA."""

from __future__ import annotations

from functools import reduce, wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ada_loss.core.formats import FLOAT16
from ada_loss.core.rules.auto import HEADROOM
from ada_loss.torch.operators.arguments import mapped
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import factor_to, over, times
from ada_loss.torch.statistics import peak

F = TypeVar("F", bound=type)


def linear_backward(function: F) -> F:
    """Give an autograd function's backward plain tensors: scaled gradients, whose scale its results then
    have.

        @ada_loss.torch.linear_backward
        class FusedNorm(torch.autograd.Function):
            ...

    That is right if the backward pass is linear in the gradients, all of them together, and adds nothing to
    them. Any other function may do without: it gets tensors that behave as true gradients in everything but
    access to their memory.

    Args:
        function: a subclass of `torch.autograd.Function`.

    Returns:
        The same class.
    """
    original = function.backward  # type: ignore[attr-defined]

    @wraps(original)
    def backward(ctx: Any, *gradients: Any) -> Any:
        scaled = [gradient for gradient in gradients if isinstance(gradient, ScaledTensor)]
        # What is recorded, to be differentiated again, has to consist of autograd's own operators.
        if not scaled or torch.is_grad_enabled():
            return original(ctx, *gradients)
        # What it computes of plain tensors stays plain.
        with _disable_current_modes():
            scale = _scale_for(scaled)
            results = original(ctx, *(_at(scale, gradient) for gradient in gradients))
            return mapped(lambda result: _from(scale, result, scaled[0]), results)

    function.backward = staticmethod(backward)  # type: ignore[attr-defined]
    return function


def _scale_for(gradients: list[ScaledTensor]) -> torch.Tensor:
    """The largest scale at which all of them leave room for sums."""
    room = FLOAT16.max * 2.0**-HEADROOM
    return reduce(torch.minimum, [g.scale * factor_to(room, peak(g.scaled_data)) for g in gradients])


def _at(scale: torch.Tensor, gradient: Any) -> Any:
    if isinstance(gradient, ScaledTensor):
        data = gradient.scaled_data
        return times(data.float(), scale / gradient.scale).to(data.dtype)
    if isinstance(gradient, torch.Tensor) and gradient.is_floating_point():
        return times(gradient, scale)
    return gradient


def _from(scale: torch.Tensor, result: Any, gradient: ScaledTensor) -> Any:
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return result
    if result.dtype == gradient.scaled_data.dtype:
        return ScaledTensor(result, scale, gradient.shifts)
    return over(result, scale)
