"""The scale-carrying backward: Chainer's backward loop with an exponent next to each gradient.

Functions are visited as `chainer.Variable.backward` visits them, by falling rank, and gradients of one variable are
added in the same order, so with float32 and powers of two the results are the same bits. What differs:

- several gradients of one variable, or of the outputs of one function, are aligned first (`gradient.align`);
- a decision point chooses a shift, computes its input gradient with it and its parameter gradients without it;
- `F.forget` is recomputed here, since its own backward would lose the exponent;
- ChainerMN's batch normalization averages over ranks in its backward, so these agree on an exponent before.

Backward of any other function is linear in its output gradients, so its exponent simply rides along.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import chainer
import numpy as np
from chainer.functions.util.forget import Forget
from chainer.variable import VariableNode, _check_grad_type

from ada_loss.chainer.decisions import Product, backward_arrays, enters_float16, input_gradient, products_of
from ada_loss.chainer.gradient import InFlight, add, align, shifted


class Decider(Protocol):
    """What the backward asks of the scope that it runs in."""

    def choose(self, function: Any, product: Product | None, gy: Any, exponent: int) -> int:
        """The shift of a decision point (`product` None: a cast) for its output gradient, an array with `exponent`."""

    def recompute(self, function: Forget) -> Graph:
        """Run a forgotten function again on fresh inputs."""


class Graph(Protocol):
    """A recorded piece of a computation."""

    inputs: list[VariableNode]
    """Fresh leaves, one for each input of the function or link that was run."""
    outputs: list[VariableNode]
    captured: dict[VariableNode, None]
    """Nodes from before that the piece uses without having been given them: parameters, variables in closures."""


class GradientTable:
    """The gradients of variable nodes that have arrived and have not been used yet."""

    def __init__(self) -> None:
        self._gradients: dict[VariableNode, list[InFlight]] = {}

    def append(self, node: VariableNode, gradient: InFlight) -> None:
        self._gradients.setdefault(node, []).append(gradient)

    def reduce(self, node: VariableNode) -> None:
        """Add up what has arrived for a node, as Chainer does after every function without `lazy_grad_sum`."""
        if node in self._gradients:
            self._gradients[node] = [add(self._gradients[node])]

    def pop(self, node: VariableNode | None) -> InFlight | None:
        gradients = self._gradients.pop(node, None) if node is not None else None
        return add(gradients) if gradients else None


def scale_carrying_backward(
    outputs: Iterable[tuple[VariableNode, InFlight]], boundary: Collection[VariableNode], decider: Decider
) -> dict[VariableNode, InFlight]:
    """Backward from `outputs` to the leaves: nodes without a creator, and those in `boundary`.

    Returns the gradient in flight of every leaf that was reached. No array that was passed in is modified.
    """
    table = GradientTable()
    leaves: dict[VariableNode, None] = {}
    candidates: list[tuple[int, int, Any]] = []
    seen: set[Any] = set()
    done: set[Any] = set()

    def arrive(node: VariableNode) -> None:
        creator = None if node in boundary else node.creator_node
        if creator is None:
            leaves[node] = None
        elif creator in done:
            raise RuntimeError(f"F.forget uses a variable of {creator.label} that was not passed to it: pass it.")
        elif creator not in seen:
            heapq.heappush(candidates, (-creator.rank, len(seen), creator))
            seen.add(creator)

    for node, gradient in outputs:
        table.append(node, gradient)
        arrive(node)
    while candidates:
        _, _, function = heapq.heappop(candidates)
        done.add(function)
        gys = [table.pop(reference()) for reference in function.outputs]
        reached = {}
        for node, gx in _step(function, gys, decider):
            _check_grad_type(function, node, True, gx.array)
            table.append(node, gx)
            reached[node] = None
        for node in reached:
            if not function.lazy_grad_sum:
                table.reduce(node)
            arrive(node)
    return {leaf: gradient for leaf in leaves if (gradient := table.pop(leaf)) is not None}


def _step(function: Any, gys: list[InFlight | None], decider: Decider) -> list[tuple[VariableNode, InFlight]]:
    """One function's backward, on the function's device and with the user's function hooks around it."""
    targets = tuple(index for index, x in enumerate(function.inputs) if x.requires_grad)
    if not targets:
        return []
    arrays, exponent = _aligned_outputs(gys)
    in_data = tuple(x.data for x in function.inputs)
    hooks = dict(chainer.get_function_hooks())
    if function._n_local_function_hooks:
        hooks.update(function.local_function_hooks)
    with chainer.using_device(chainer.backend.get_device_from_array(*in_data, *arrays)):
        for hook in hooks.values():
            hook.backward_preprocess(function, in_data, arrays)
        gradients = _gradients(function, targets, arrays, exponent, decider)
        for hook in hooks.values():
            hook.backward_postprocess(function, in_data, arrays)
    return gradients


def _aligned_outputs(gys: list[InFlight | None]) -> tuple[tuple[Any, ...], int]:
    present = [gy for gy in gys if gy is not None]
    if not present:
        return (None,) * len(gys), 0
    arrays, exponent = align(present)
    remaining = iter(arrays)
    return tuple(None if gy is None else next(remaining) for gy in gys), exponent


def _gradients(
    function: Any, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int, decider: Decider
) -> list[tuple[VariableNode, InFlight]]:
    if isinstance(function, Forget):
        return _forgotten(function, targets, gys, exponent, decider)
    if type(function).__module__.startswith("chainermn.functions"):
        raise RuntimeError(
            f"{function.label} sends gradients to other processes, which know nothing of their scale: keep it outside "
            "AdaLossScaled."
        )
    communicator = _communicator(function)
    if communicator is not None and gys[0] is not None:
        # MPI is needed only here.
        from ada_loss.chainer.mn import at_agreed_exponent

        gy, exponent = at_agreed_exponent(InFlight(gys[0], exponent), communicator)
        gys = (gy,)
    if enters_float16(function) and gys[0] is not None:
        shift = decider.choose(function, None, gys[0], exponent)
        return [(function.inputs[0], InFlight(shifted(gys[0], shift, np.float16), exponent + shift))]
    products = [] if gys[0] is None else [p for p in products_of(function) if p.data in targets]
    plain = tuple(sorted(set(targets) - {product.data for product in products}))
    found = {index: (gx, exponent) for index, gx in zip(plain, backward_arrays(function, plain, gys), strict=True)}
    for product in products:
        shift = decider.choose(function, product, gys[0], exponent)
        found[product.data] = (input_gradient(function, product, gys, shift), exponent + shift)
    return [(function.inputs[index], InFlight(*found[index])) for index in targets if found[index][0] is not None]


def _communicator(function: Any) -> Any:
    """The communicator of a batch normalization that averages statistics of its gradient over ranks, or None."""
    return getattr(getattr(function, "_impl_selector", None), "comm", None)


def _forgotten(
    function: Forget, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int, decider: Decider
) -> list[tuple[VariableNode, InFlight]]:
    graph = decider.recompute(function)
    entries = [(node, InFlight(gy, exponent)) for node, gy in zip(graph.outputs, gys, strict=True) if gy is not None]
    reached = scale_carrying_backward(entries, graph.captured, decider)
    given = [(function.inputs[index], reached.get(graph.inputs[index])) for index in targets]
    captured = [(node, reached.get(node)) for node in graph.captured]
    return [(node, gradient) for node, gradient in given + captured if gradient is not None]
