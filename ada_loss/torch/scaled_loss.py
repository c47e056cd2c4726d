"""The loss that `GradScaler.scale` returns: the same number, whose backward pass scales."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ada_loss.torch.backward_mode import BackwardMode, active_mode


class Differentiates(Protocol):
    """What a scaled loss comes from: a `GradScaler`."""

    def differentiating(self) -> AbstractContextManager[BackwardMode]:
        """The mode, around one backward pass."""


class ScaledLoss(torch.Tensor):
    """A loss, or what was computed from one: its `backward` and its `torch.autograd.grad` scale."""

    source: Differentiates

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        source = _source_of((args, kwargs))
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            with source.differentiating():
                return func(*_plain(args), **_plain(kwargs))
        result = super().__torch_function__(func, types, args, kwargs)
        _mark(result, source)
        return result


class _Gate(torch.autograd.Function):
    """The identity, whose backward pass insists on the mode and scales what it begins with."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        mode = active_mode()
        if mode is None:
            raise RuntimeError(
                "A loss from GradScaler.scale() was differentiated without scaling: call the loss's own "
                "backward(), or do it within `with ada_loss.torch.backward():`."
            )
        return mode.seed(gradient)


def scaled_loss(loss: torch.Tensor, source: Differentiates) -> ScaledLoss:
    """The loss as one whose backward pass scales."""
    result = _Gate.apply(loss).as_subclass(ScaledLoss)
    result.source = source
    return result


def _source_of(value: Any) -> Any:
    """Where the first scaled loss in nested arguments comes from; None without one."""
    if isinstance(value, ScaledLoss):
        return value.source
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((source for source in map(_source_of, value) if source is not None), None)
    return None


def _mark(value: Any, source: Differentiates) -> None:
    if isinstance(value, ScaledLoss):
        value.source = source
    elif isinstance(value, (tuple, list)):
        for item in value:
            _mark(item, source)


def _plain(value: Any) -> Any:
    if isinstance(value, ScaledLoss):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    return value
