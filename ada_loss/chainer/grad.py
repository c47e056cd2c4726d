"""`chainer.grad` on this engine: true gradients, in float32 where those of the variables are float16."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import chainer
import numpy as np
from chainer import function_node
from chainer.variable import VariableNode

from ada_loss.arrays.casting import cast
from ada_loss.chainer import backward_state
from ada_loss.chainer.backward import BackwardPass, is_ours
from ada_loss.chainer.gradient import ScaledGradient, shifted
from ada_loss.chainer.ownership import tag_graph

# This module may be reloaded, when its functions are installed already.
_chainers_grad = inspect.unwrap(function_node.grad)
_chainers_backprop = inspect.unwrap(function_node._backprop)


class PartialPass(BackwardPass):
    """The part of a pass that leads to the nodes `wanted`, whose gradients it keeps, by those `required`.

    retain_grad: whether variables on the way are given their gradients as well.
    """

    def __init__(
        self, wanted: Iterable[VariableNode], required: set[VariableNode], *, retain_grad: bool
    ) -> None:
        super().__init__()
        self._wanted = dict.fromkeys(wanted)
        self._required = required
        self._retain_all = retain_grad
        self._found: dict[VariableNode, ScaledGradient | None] = {}

    def result(self) -> dict[VariableNode, chainer.Variable | None]:
        """The gradients of the nodes that are wanted, as the code sees them that asked."""
        for node in self._wanted.keys() - self._found.keys():
            self.pop(node)
        return {
            node: None if gradient is None else chainer.Variable(_shown(gradient))
            for node, gradient in self._found.items()
        }

    def pop(self, node: VariableNode | None) -> ScaledGradient | None:
        gradient = super().pop(node)
        if node is not None and node in self._wanted:
            self._found[node] = gradient
        if self._retain_all and node is not None and node.creator_node is not None:
            self._retain([node], (gradient and gradient.array,), gradient.exponent if gradient else 0)
        return gradient

    def _targets(self, function: Any) -> tuple[int, ...]:
        return tuple(index for index, x in enumerate(function.inputs) if x in self._required)

    def _present(self, leaf: VariableNode) -> list[ScaledGradient]:
        return []


def _shown(gradient: ScaledGradient) -> Any:
    """The array for the code that asked for it: float32 in place of float16, which could not hold it, unless
    that code is a function's backward, which goes on with it."""
    exponent = backward_state.exponent()
    dtype = gradient.array.dtype
    if not backward_state.in_users_backward():
        dtype = np.promote_types(dtype, np.float32)
    return shifted(gradient.array, exponent - gradient.exponent, dtype)


@functools.wraps(_chainers_backprop)
def _backprop(
    outputs: Any, inputs: Any, grad_required: Any, retain_grad: bool, grads: Any, loss_scale: Any
) -> Any:
    if not is_ours([(y.node, None) for y in outputs], loss_scale):
        return _chainers_backprop(outputs, inputs, grad_required, retain_grad, grads, loss_scale)
    this = PartialPass((x.node for x in inputs), grad_required, retain_grad=retain_grad)
    exponent = backward_state.exponent()
    given = ((node, ScaledGradient(gy.array, exponent)) for node, gys in grads.grads.items() for gy in gys)
    with backward_state.noted(loss_scale):
        tag_graph((y.node, None) for y in outputs)
        this.run(given, starts=[y.node for y in outputs])
    return this.result()


@functools.wraps(_chainers_grad)
def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(_chainers_grad).bind(outputs, inputs, *args, **kwargs)
    set_grad = bound.arguments.pop("set_grad", False)
    found = _chainers_grad(*bound.args, **bound.kwargs)
    for x, gx in zip(inputs if set_grad else (), found, strict=set_grad):
        if gx is None or gx.dtype == x.dtype or isinstance(x, chainer.Parameter):
            x.grad_var = gx
        else:
            x.grad_var = chainer.Variable(cast(gx.array, x.dtype))
    return found


def install() -> None:
    """Make `chainer.grad` use this engine."""
    function_node._backprop = _backprop
    function_node.grad = chainer.grad = _grad
