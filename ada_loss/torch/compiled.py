"""`torch.compile(model, backend=ada_loss.torch.backend)`: PyTorch's own compiler, with scales within the
backward graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch.backward_mode import BackwardMode, active_mode
from ada_loss.torch.compiled_backward import ScaledGraph, scale_graph
from ada_loss.torch.foreign_graphs import mark_as_scaling
from ada_loss.torch.shifts import Shifts, shifts_for


def backend(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend for `torch.compile`: inductor, whose backward graphs scale float16 gradients layer by layer.

        model = torch.compile(model, backend=ada_loss.torch.backend)

    Everything else stays: autocast, `GradScaler`, `with ada_loss.torch.backward()` around the backward pass.

    Args:
        module: the graph that `torch.compile` has captured.
        inputs: examples for it.
        options: of `torch.compile`: settings of `AdaLossConfig` by name, those of the scaler.

    Returns:
        The compiled graph.

    Raises:
        ValueError: an option is no setting, or has a wrong value.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    config = AdaLossConfig(**(options or {}))
    halves = _widen_half_results(module)

    def compile_one(graph: torch.fx.GraphModule, examples: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            return compile_fx_inner(graph, examples, **kwargs)
        mode = active_mode()
        with mode.paused() if mode else nullcontext():
            scaled = scale_graph(graph, examples, config)
        return _called_by_autograd(compile_fx_inner(scaled.module, scaled.inputs, **kwargs), scaled, config)

    # Otherwise a model that is compiled without scales would be given this one's cached graphs.
    with functorch_config.patch(enable_autograd_cache=False):
        compiled = compile_fx(module, inputs, inner_compile=compile_one)
    return _finished(compiled, halves)


def _called_by_autograd(
    compiled: Callable[..., Any], graph: ScaledGraph, config: AdaLossConfig
) -> Callable[[list[Any]], Any]:
    """A compiled backward graph as autograd calls it: with a list, which the compiler's own code empties."""
    default = shifts_for(config)

    def run(arguments: list[Any]) -> Any:
        mode = active_mode()
        shifts = default if mode is None else _shifts_of(mode, config)
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        arguments.append(_entry_of(shifts).to(device, non_blocking=True))
        with _disable_current_modes():
            outputs = compiled(arguments)
        return graph.joined(outputs, shifts)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _shifts_of(mode: BackwardMode, config: AdaLossConfig) -> Shifts:
    if mode.shifts.config != config:
        raise RuntimeError(
            "This model was compiled for other settings than those of the scaler: pass the same to "
            f"torch.compile(..., options=...), {mode.shifts.config}."
        )
    mode.entered += 1
    return mode.shifts


def _entry_of(shifts: Shifts) -> torch.Tensor:
    return torch.tensor(shifts.config.init_scale) if shifts.entry is None else shifts.entry


def _widen_half_results(module: torch.fx.GraphModule) -> tuple[int, ...]:
    """Let float16 results that are differentiated leave a graph as float32: the gradient of a float16 one
    would arrive scaled, which a compiled graph cannot take. Returns their positions."""
    (output,) = module.graph.find_nodes(op="output")
    results = list(output.args[0])
    widened = []
    for i, node in enumerate(results):
        value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16 and value.requires_grad:
            with module.graph.inserting_before(output):
                results[i] = module.graph.call_method("float", (node,))
            results[i].meta["example_value"] = value.float()
            widened.append(i)
    output.args = (tuple(results),)
    module.recompile()
    return tuple(widened)


def _finished(compiled: Callable[..., Any], halves: tuple[int, ...]) -> Callable[..., Any]:
    """A compiled graph whose results at these positions are float16 again, and are known to scale."""

    def run(*arguments: Any) -> Any:
        results = list(compiled(*arguments))
        for result in results:
            mark_as_scaling(result)
        for i in halves:
            results[i] = results[i].half()
        return tuple(results)

    return run
