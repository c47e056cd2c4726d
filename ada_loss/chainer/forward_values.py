"""Values of a forward pass that is over, as far as its graph knows them or can compute them once more."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import chainer
import numpy as np

from ada_loss.arrays.library import all_finite

_PURE = tuple(
    f"chainer.functions.{name}." for name in ("activation", "array", "connection", "loss", "math", "pooling")
)
"""Modules of functions whose forward leaves no trace but in the function itself."""


class What(Enum):
    """What of a function is not finite."""

    RESULT = "its result, though its inputs are"
    RESULT_OR_INPUT = "its result, where nobody knows what went in"
    INPUT = "an input that comes from outside the graph"
    PARAMETER = "a parameter"


class Blame(NamedTuple):
    """The first function of a graph that something is wrong with. users: functions of its results."""

    function: Any
    what: What
    users: tuple[Any, ...] = ()


def value_of(node: Any) -> Any:
    """The array of a variable node; None where nobody has kept it."""
    variable = node.get_variable_or_none()
    return node.data if variable is None else variable.array


def results_of(function: Any) -> list[Any]:
    """The arrays that a function has returned; None for those that nobody has kept."""
    try:
        kept = function.output_data
    except RuntimeError:
        kept = (None,) * len(function.outputs)
    nodes = [reference() for reference in function.outputs]
    return [
        value_of(node) if value is None and node is not None else value
        for node, value in zip(nodes, kept, strict=True)
    ]


def is_finite(value: Any) -> bool:
    """Whether every element of an array is finite, as far as is known: None stands for an unknown one."""
    return value is None or value.dtype.kind != "f" or all_finite([value])


def first_not_finite(nodes: Iterable[Any]) -> Blame | None:
    """The first function, in the order of the forward pass, whose result or input is not finite.

    Results that nobody has kept are computed once more, where that leaves no trace. Where it is not known
    which of several functions in a row was the first, it is the first of these.

    Args:
        nodes: of variables; the graph from which they were computed is searched.
    """
    values: dict[Any, Any] = {}
    with np.errstate(all="ignore"), chainer.no_backprop_mode():
        functions = _upstream(nodes)
        for function in functions:
            blame = _blame(function, values)
            if blame is not None:
                users = (f for f in functions if any(x.creator_node is blame.function for x in f.inputs))
                return blame._replace(users=tuple(users))
    return None


def _blame(function: Any, values: dict[Any, Any]) -> Blame | None:
    """What is wrong with a function; its results go into `values`, which has those before it."""
    for x in function.inputs:
        if x.creator_node is None:
            values[x] = value_of(x)
            if not is_finite(values[x]):
                variable = x.get_variable_or_none()
                return Blame(
                    function, What.PARAMETER if isinstance(variable, chainer.Parameter) else What.INPUT
                )
    outputs = _results(function, [values.get(x) for x in function.inputs])
    for node, value in outputs.items():
        values[node] = value
        if not is_finite(value):
            first = _first_unknown(function, values)
            unknown = any(values.get(x) is None for x in first.inputs)
            return Blame(first, What.RESULT_OR_INPUT if unknown else What.RESULT)
    return None


def _results(function: Any, inputs: list[Any]) -> dict[Any, Any]:
    """The results of a function by their nodes, None where they cannot be had."""
    values = results_of(function)
    if any(value is None for value in values) and all(x is not None for x in inputs):
        values = _computed_again(function, inputs) or values
    nodes = (reference() for reference in function.outputs)
    return {node: value for node, value in zip(nodes, values, strict=True) if node is not None}


def _computed_again(function: Any, inputs: list[Any]) -> list[Any] | None:
    if not type(function).__module__.startswith(_PURE) or isinstance(
        function, chainer.function.FunctionAdapter
    ):
        return None
    state = np.random.get_state()
    try:
        with chainer.using_device(chainer.backend.get_device_from_array(*inputs)):
            return list(copy.copy(function).forward(tuple(inputs)))
    except Exception:
        # Some need more than their inputs. Without them the answer is less exact.
        return None
    finally:
        np.random.set_state(state)


def _first_unknown(function: Any, values: dict[Any, Any]) -> Any:
    """The earliest of the functions that lead to this one and whose results are not known."""
    while True:
        makers = (x.creator_node for x in function.inputs if values.get(x) is None)
        before = next((maker for maker in makers if maker is not None), None)
        if before is None:
            return function
        function = before


def _upstream(nodes: Iterable[Any]) -> list[Any]:
    """The functions that the nodes were computed by, in an order in which they were applied."""
    waiting = [node.creator_node for node in nodes]
    found = set()
    while waiting:
        function = waiting.pop()
        if function is not None and function not in found:
            found.add(function)
            waiting += [x.creator_node for x in function.inputs]
    return sorted(found, key=lambda function: function.rank)
