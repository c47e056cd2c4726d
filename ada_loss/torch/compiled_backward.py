"""Scales within a compiled backward graph.

AOTAutograd hands the backward graph over before it is compiled. It is traced once more while the operators'
rules are applied to it, so that scales become ordinary operators of the graph. Results stay in float32 there
(`Shifts.late`) and are rounded where a product takes them, since the compiler keeps what lies between two
products in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch import operators
from ada_loss.torch.operators.arguments import mapped, scaled_in, true
from ada_loss.torch.operators.results import rounded_late
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.shifts import Shifts, shifts_for

Arrays = Sequence[Any]


@dataclass(frozen=True)
class ScaledGraph:
    """A backward graph with scales in it.

    module: takes the graph's inputs and the entry scale behind them. It returns the graph's outputs, where
        those at `scaled` are of float16 and scaled, and their scales behind all of them.
    inputs: examples for the module.
    scaled: positions among the outputs.
    """

    module: torch.fx.GraphModule
    inputs: list[Any]
    scaled: tuple[int, ...]

    def joined(self, outputs: Arrays, shifts: Shifts) -> list[Any]:
        """The outputs of the graph, as autograd is to see them."""
        count = len(outputs) - len(self.scaled)
        results = list(outputs[:count])
        for position, scale in zip(self.scaled, outputs[count:], strict=True):
            results[position] = ScaledTensor(results[position], scale, shifts)
        return results


def scale_graph(module: torch.fx.GraphModule, inputs: Arrays, config: AdaLossConfig) -> ScaledGraph:
    """A backward graph as AOTAutograd gives it to its compiler, traced again with scales.

    Args:
        module: the graph.
        inputs: fake tensors and sizes, one for each placeholder.
        config: settings of the scales.
    """
    scaled: tuple[int, ...] = ()

    def traced(*arguments: Any) -> list[Any]:
        nonlocal scaled
        shifts = shifts_for(config, arguments[-1], late=True)
        outputs = [_leaving(output) for output in _Interpreter(module, shifts).run(*arguments[:-1])]
        scaled = tuple(i for i, output in enumerate(outputs) if isinstance(output, ScaledTensor))
        data = [output.scaled_data if isinstance(output, ScaledTensor) else output for output in outputs]
        return [*data, *(outputs[i].scale for i in scaled)]

    fake_mode = detect_fake_mode(inputs)
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    from torch._inductor.decomposition import select_decomp_table

    with fake_mode, enable_python_dispatcher():
        arguments = [*inputs, torch.ones((), device=device)]
        graph = make_fx(traced, decomposition_table=select_decomp_table(), tracing_mode="real")(*arguments)
    _keep_visible_outputs(module, graph)
    return ScaledGraph(graph, arguments, scaled)


class _Interpreter(torch.fx.Interpreter):
    """Runs a backward graph by the operators' rules."""

    def __init__(self, module: torch.fx.GraphModule, shifts: Shifts) -> None:
        super().__init__(module)
        self._shifts = shifts
        self._gradients = _depending_on_gradients(module)
        self._is_gradient = False

    def run_node(self, n: torch.fx.Node) -> Any:
        self._is_gradient = n in self._gradients
        return _in_layout_of(n.meta.get("val"), super().run_node(n))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return self._other(target, args, kwargs)
        if scaled_in((args, kwargs)):
            return operators.apply(target, args, kwargs)
        result = NotImplemented
        if self._is_gradient:
            result = operators.begins_scaled(target, args, kwargs, self._shifts)
        return super().call_function(target, args, kwargs) if result is NotImplemented else result

    def _other(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Picking from a tuple, arithmetic of sizes, and what has no rule: higher-order operators."""
        if not isinstance(target, torch._ops.HigherOrderOperator) or not scaled_in((args, kwargs)):
            return super().call_function(target, args, kwargs)
        return target(*mapped(_plain, args), **mapped(_plain, kwargs))


def _depending_on_gradients(module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The nodes of a backward graph that are no parts of forward, computed again."""
    found: set[torch.fx.Node] = set()
    for node in module.graph.nodes:
        begins = node.op == "placeholder" and node.name.startswith("tangents")
        if begins or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _plain(leaf: Any) -> Any:
    """What a higher-order operator is given: it insists on the dtypes that it was traced with."""
    return true(leaf).to(leaf.dtype) if isinstance(leaf, ScaledTensor) else leaf


def _leaving(output: Any) -> Any:
    return rounded_late(output) if isinstance(output, ScaledTensor) else output


def _in_layout_of(expected: Any, result: Any) -> Any:
    """A result with the strides that the graph's next operators rely on."""
    if isinstance(result, (tuple, list)):
        wanted = expected if isinstance(expected, (tuple, list)) else [None] * len(result)
        return type(result)(_in_layout_of(e, r) for e, r in zip(wanted, result, strict=True))
    if not isinstance(result, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return result
    if isinstance(result, ScaledTensor):
        data = _strided_as(expected, result.scaled_data)
        return result if data is result.scaled_data else result.with_data(data)
    return _strided_as(expected, result)


def _strided_as(expected: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    if data.stride() == expected.stride():
        return data
    return data.new_empty_strided(expected.size(), expected.stride()).copy_(data)


def _keep_visible_outputs(source: torch.fx.GraphModule, target: torch.fx.GraphModule) -> None:
    """What the compiler notes of outputs at a graph's end."""
    before, after = (next(iter(reversed(graph.graph.nodes))) for graph in (source, target))
    name = "user_visible_output_idxs"
    if name in before.meta:
        after.meta[name] = before.meta[name]
