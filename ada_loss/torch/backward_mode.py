"""Backward with a scale for every gradient in float16: a dispatch mode that sees each operation.

The mode is there on the threads of autograd's engine as well. A cast of a true gradient to float16 makes a
scaled tensor, of which the operators' rules know everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch import operators
from ada_loss.torch.foreign_graphs import refuse_foreign_graphs
from ada_loss.torch.operators.results import one
from ada_loss.torch.scaled_tensor import ScaledTensor, holds_others
from ada_loss.torch.shifts import Shifts, shifts_for


class BackwardMode(TorchDispatchMode):
    """Scales what backward computes within.

    shifts: the rule that chooses how far.
    entered: how many gradients were scaled so far, where they entered a scaled dtype.
    """

    def __init__(self, shifts: Shifts) -> None:
        super().__init__()
        self.shifts = shifts
        self.entered = 0
        self._recorded = False
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if types:
            if holds_others(types):
                return NotImplemented
            if ScaledTensor in types:
                return operators.apply(func, args, kwargs)
        # With gradients enabled this is a forward pass, as checkpointing computes it again within backward;
        # unless backward itself is recorded, to be differentiated again.
        if torch.is_grad_enabled() and not self._recorded:
            return func(*args, **kwargs)
        result = operators.begins_scaled(func, args, kwargs, self.shifts)
        if result is NotImplemented:
            return func(*args, **kwargs)
        self.entered += 1
        return result

    @contextmanager
    def recorded(self, recorded: bool) -> Iterator[None]:
        """Around a backward pass that is recorded, to be differentiated again, or is not."""
        before, self._recorded = self._recorded, recorded
        try:
            yield
        finally:
            self._recorded = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no backward pass, such as compiling one."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def seed(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient with which backward begins; scaled where it is of a scaled dtype."""
        if gradient.dtype not in self.shifts.dtypes or isinstance(gradient, ScaledTensor):
            return gradient
        self.entered += 1
        return ScaledTensor(gradient, one(gradient), self.shifts)


def active_mode() -> BackwardMode | None:
    """The innermost mode of this thread."""
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, BackwardMode)]
    return modes[-1] if modes else None


class _Differentiation(TorchFunctionMode):
    """Sees where backward begins, for the gradients that it begins with, and what `torch.autograd.grad`
    returns."""

    def __init__(self, mode: BackwardMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return _backward(self._mode, *args, **kwargs)
        if func is torch.autograd.backward:
            return _backward_of_several(self._mode, *args, **kwargs)
        if func is torch.autograd.grad:
            return _grad(self._mode, *args, **kwargs)
        if func in _ASKED_OF_SEEDS and sys._getframe(1).f_code is torch.autograd._make_grads.__code__:
            return self._of_seed(func, args, kwargs)
        return func(*args, **kwargs)

    def _of_seed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What `torch.autograd.backward` does with what it begins with, where this version of PyTorch does
        not let it be overridden."""
        if func is torch.ones_like:
            return self._mode.seed(func(*args, **kwargs))
        if args[0].dtype in self._mode.shifts.dtypes and not isinstance(args[0], ScaledTensor):
            raise RuntimeError(
                "torch.autograd.backward() was given a gradient in float16, which would not be scaled: give "
                "it to the tensor's own backward()."
            )
        return func(*args, **kwargs)


_ASKED_OF_SEEDS = frozenset([torch.ones_like, torch.Tensor.size])


def _backward(
    mode: BackwardMode,
    tensor: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **kwargs: Any,
) -> None:
    refuse_foreign_graphs([tensor])
    with mode.recorded(create_graph):
        seed = _seed_for(mode, tensor, gradient)
        torch.Tensor.backward(tensor, seed, retain_graph, create_graph, **kwargs)


def _backward_of_several(
    mode: BackwardMode,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **kwargs: Any,
) -> None:
    with mode.recorded(create_graph):
        tensors, seeds = _with_seeds(mode, tensors, grad_tensors)
        torch.autograd.backward(tensors, seeds, retain_graph, create_graph, **kwargs)


def _grad(
    mode: BackwardMode,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **kwargs: Any,
) -> Any:
    with mode.recorded(create_graph):
        outputs, seeds = _with_seeds(mode, outputs, grad_outputs)
        gradients = torch.autograd.grad(outputs, inputs, seeds, retain_graph, create_graph, **kwargs)
        return tuple(_true(gradient) for gradient in gradients)


def _true(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """By an operator, which autograd can differentiate."""
    if not isinstance(gradient, ScaledTensor):
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _with_seeds(mode: BackwardMode, outputs: Any, gradients: Any) -> tuple[Any, Any]:
    """Outputs, and the gradients with which their backward pass begins, as many."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    refuse_foreign_graphs(output for output in outputs if isinstance(output, torch.Tensor))
    given = (gradients,) if gradients is None or isinstance(gradients, torch.Tensor) else tuple(gradients)
    if given == (None,):
        given *= len(outputs)
    if len(given) != len(outputs):
        return outputs, gradients  # autograd says what is wrong with that
    return outputs, tuple(map(partial(_seed_for, mode), outputs, given))


def _seed_for(mode: BackwardMode, output: Any, gradient: torch.Tensor | None) -> torch.Tensor | None:
    if not isinstance(output, torch.Tensor):
        return gradient  # an edge of the graph
    if gradient is None:
        if output.dtype not in mode.shifts.dtypes or output.numel() != 1:
            return None
        gradient = torch.ones_like(output)
    return mode.seed(gradient)


@contextmanager
def backward(config: AdaLossConfig | None = None, *, shifts: Shifts | None = None) -> Iterator[BackwardMode]:
    """Backward passes within scale float16 gradients layer by layer; what they leave in `grad` is true, and
    float32 where it was float16.

        with ada_loss.torch.backward():
            loss.backward()

    Args:
        config: settings; `auto` if left out.
        shifts: a rule made already, in place of `config`.

    Raises:
        ValueError: `config` asks for what PyTorch's front end does not have.
    """
    if shifts is None:
        shifts = shifts_for(config or AdaLossConfig())
    mode = BackwardMode(shifts)
    with mode, _Differentiation(mode), _says_what_ddp_means():
        yield mode


@contextmanager
def _says_what_ddp_means() -> Iterator[None]:
    """Around backward: where DistributedDataParallel finds true gradients of parameters in float16, it names
    only dtypes."""
    try:
        yield
    except RuntimeError as error:
        if "Expected Half, got Float" not in str(error) or not torch.distributed.is_available():
            raise
        raise RuntimeError(
            "DistributedDataParallel exchanges gradients of float16 parameters in float16, without a scale: "
            "keep parameters in float32, under torch.autocast(device, torch.float16)."
        ) from error
