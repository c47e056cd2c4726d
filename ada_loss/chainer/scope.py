"""The scope: one node of Chainer's graph that holds the graph of a wrapped link and runs its backward with exponents.

To Chainer's engine the scope is a function of the link's inputs and of every variable that the link uses without being
given it (parameters, state kept from an earlier call). Its outputs are the link's results and every inner variable that
somebody kept, such as recurrent state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chainer
import numpy as np
from chainer.functions.util.forget import Forget
from chainer.variable import VariableNode

from ada_loss.chainer import passes
from ada_loss.chainer.backward import scale_carrying_backward
from ada_loss.chainer.decisions import Product, weight_of
from ada_loss.chainer.gradient import InFlight, shifted
from ada_loss.chainer.parameters import adopt
from ada_loss.chainer.policy import ShiftPolicy
from ada_loss.chainer.recorder import Recorder, Site
from ada_loss.chainer.structure import flatten, rebuild

ENTRY = "(entry)"
"""The path under which a scope's own casts to float16 are recorded."""


@dataclass(frozen=True)
class Context:
    """What all calls of one wrapped link share.

    recorder: makes a fresh recorder for a call. output_dtype: what float16 results are cast to; None leaves them.
    """

    policy: ShiftPolicy
    recorder: Callable[[], Recorder]
    output_dtype: np.dtype[Any] | None

    def cast(self, array: Any) -> Any:
        """The array of a result as it leaves the scope."""
        if self.output_dtype is None or array.dtype != np.float16:
            return array
        return array.astype(self.output_dtype)

    def cast_results(self, results: Any) -> Any:
        """Variables in a nested structure, without a graph, as they leave the scope."""
        variables, layout = flatten(results)
        return rebuild(layout, [chainer.Variable(self.cast(y.array), requires_grad=False) for y in variables])


class Recording:
    """One run of a callable on fresh leaves.

    given: the variables that were passed, each once. inputs: their leaves in the inner graph. results: the inner
    variables that came back. captured: nodes from before that were used without being passed.
    """

    def __init__(self, run: Callable[..., Any], args: Any, recorder: Recorder) -> None:
        passed, layout = flatten(args)
        self.given = list({x.node: x for x in passed}.values())
        leaves = {x.node: chainer.Variable(x.array, name=x.name, requires_grad=x.requires_grad) for x in self.given}
        self.inputs = [leaves[x.node].node for x in self.given]
        args, kwargs = rebuild(layout, [leaves[x.node] for x in passed])
        with chainer.force_backprop_mode(), recorder:
            returned = run(*args, **kwargs)
        self.results, self.layout = flatten(returned)
        self.functions = recorder.functions
        self.captured = self._captured()

    @property
    def outputs(self) -> list[VariableNode]:
        return [y.node for y in self.results]

    def forget_variables(self) -> list[chainer.Variable]:
        """Drop the inner variables and the list of functions; returns the variables that somebody else kept."""
        nodes = dict.fromkeys(self.inputs)
        for function in self.functions:
            nodes.update((node, None) for reference in function.outputs if (node := reference()) is not None)
        self.functions, self.results = [], []
        kept = [node.get_variable_or_none() for node in nodes]
        return [variable for variable in kept if variable is not None and variable.requires_grad]

    def _captured(self) -> dict[VariableNode, None]:
        inside, own = set(self.functions), set(self.inputs)
        used = [node for function in self.functions for node in function.inputs] + self.outputs
        foreign = [x for x in used if x.requires_grad and x not in own and x.creator_node not in inside]
        for node in foreign:
            if node.creator_node is not None and node.get_variable_or_none() is None:
                raise RuntimeError(
                    f"A result of {node.creator_node.label} is used inside AdaLossScaled but was not passed to it: "
                    "pass it as an argument."
                )
        # A leaf that nobody can reach any more needs no gradient.
        return {node: None for node in foreign if node.get_variable_or_none() is not None}


class AdaLossScope(chainer.FunctionNode):
    """A wrapped link's computation as one function; `apply_in_scope` makes it.

    outputs: inner nodes, with the arrays that leave the scope for them.
    """

    def __init__(self, context: Context, recording: Recording, outputs: list[tuple[VariableNode, Any]]) -> None:
        self._context = context
        self._inputs = recording.inputs
        self._captured = recording.captured
        self._outputs = [node for node, _ in outputs]
        self._arrays = tuple(array for _, array in outputs)

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        arrays, self._arrays = self._arrays, ()
        return arrays

    def backward(self, targets: tuple[int, ...], gys: tuple[Any, ...]) -> tuple[Any, ...]:
        if chainer.config.enable_backprop:
            raise RuntimeError("AdaLossScaled cannot be differentiated twice: call backward without double backprop.")
        entries = [
            (node, self._enter(gy.array, node, place))
            for place, (node, gy) in enumerate(zip(self._outputs, gys, strict=True))
            if gy is not None
        ]
        reached = scale_carrying_backward(entries, self._captured, self)
        leaves = [*self._inputs, *self._captured]
        asked = [(leaf, reached.get(leaf)) for leaf in (leaves[index] for index in targets)]
        return tuple(None if gradient is None else _leave(leaf, gradient) for leaf, gradient in asked)

    def unchain(self) -> None:
        super().unchain()
        self._outputs, self._inputs, self._captured = [], [], {}

    def choose(self, function: Any, product: Product | None, gy: Any, exponent: int) -> int:
        site = getattr(function, "ada_loss_site", Site("/", 0))
        if product is None:
            return self._context.policy.choose(site, gy, exponent)
        weight = weight_of(function, product)
        fan = product.fan(function, weight.shape)
        site = site._replace(operand=product.data)
        return self._context.policy.choose(site, gy, exponent, weight, fan, product.channel_axis)

    def recompute(self, function: Forget) -> Recording:
        inputs = tuple(chainer.Variable(x.array) for x in function.get_retained_inputs())
        with chainer.using_config("in_recomputing", True):
            return Recording(function.func, (inputs, {}), self._context.recorder())

    def _enter(self, gy: Any, node: VariableNode, place: int) -> InFlight:
        policy = self._context.policy
        exponent = policy.entry.exponent
        scaled = shifted(gy, exponent)
        if node.dtype != np.float16 or gy.dtype == np.float16:
            return InFlight(scaled.astype(node.dtype, copy=False), exponent)
        shift = policy.choose(Site(ENTRY, place), scaled, exponent)
        return InFlight(shifted(scaled, shift, np.float16), exponent + shift)


def apply_in_scope(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> Any:
    """Run a callable with its computation as one scope."""
    recording = Recording(run, (args, kwargs), context.recorder())
    returned = [(y.node, context.cast(y.array), y.requires_grad) for y in recording.results]
    outputs = [(node, array) for node, array, requires_grad in returned if requires_grad]
    if not outputs:
        return rebuild(recording.layout, [chainer.Variable(array, requires_grad=False) for _, array, _ in returned])
    kept = recording.forget_variables()
    outputs += [(variable.node, variable.array) for variable in kept]
    captured = [node.get_variable() for node in recording.captured]
    results = AdaLossScope(context, recording, outputs).apply((*recording.given, *captured))
    for variable, outer in zip(kept, results[len(results) - len(kept) :], strict=True):
        _rebind(variable, outer)
    differentiable = iter(results)
    return rebuild(
        recording.layout,
        [next(differentiable) if grad else chainer.Variable(array, requires_grad=False) for _, array, grad in returned],
    )


def _leave(leaf: VariableNode, gradient: InFlight) -> chainer.Variable | None:
    """What the outer engine gets for an input: its true gradient; nothing for a parameter, which keeps its own.

    Chainer's `grad` wants parameters' gradients as results like any other.
    """
    variable = leaf.get_variable_or_none()
    if passes.running() and isinstance(variable, chainer.Parameter):
        adopt(variable).receive(gradient, passes.loss_scale())
        return None
    return chainer.Variable(shifted(gradient.array, -gradient.exponent))


def _rebind(variable: chainer.Variable, outer: chainer.Variable) -> None:
    """Move a variable that somebody kept out of the inner graph: from now on it is an output of the scope."""
    variable.node._variable = _nobody
    outer.node.name = variable.name
    variable._node = outer.node
    variable._node._variable = weakref.ref(variable)


def _nobody() -> None:
    """A dead weak reference."""
