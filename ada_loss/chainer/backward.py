"""The scale-carrying backward: Chainer's engine with an exponent next to each gradient.

Functions are visited as `chainer.Variable.backward` visits them, by falling rank, and gradients of one
variable are added in the same order, so with float32 and powers of two the results are the same bits. What
differs, for functions in a scope only:

- a gradient that enters the scope gets the entry exponent, one that leaves it becomes the true gradient;
  gradients of parameters stay scaled until the optimizer asks for them;
- several gradients of one variable, or of the outputs of one function, are aligned first (`gradient.align`);
- a decision point chooses a shift, computes its input gradient with it and its parameter gradients without
  it;
- `F.forget` is recomputed here, since its own backward would lose the exponent;
- ChainerMN's batch normalization averages over ranks in its backward, so these agree on an exponent before.

Backward of any other function of Chainer's is linear in its output gradients, so its exponent simply rides
along. Functions of the user's own and hooks see true gradients (`user_functions.py`, `hooks.py`).

`install` puts the engine in place of Chainer's, as the first scaled model does. Graphs without a scope,
and gradients that are to be differentiated again, are still left to Chainer's.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import chainer
import numpy as np
from chainer import _backprop
from chainer.functions.util.forget import Forget, _call_func
from chainer.variable import VariableNode, _check_grad_type

from ada_loss.chainer import backward_state, observing, origin, running_statistics
from ada_loss.chainer.agreement import at_agreed_exponent
from ada_loss.chainer.gradient import UNKNOWN_PLACE, Accumulation, ScaledGradient, add, align, shifted
from ada_loss.chainer.hooks import hooked
from ada_loss.chainer.ownership import in_scopes, tag_graph
from ada_loss.chainer.parameter_gradients import gradients_in_range, parameter_gradients
from ada_loss.chainer.parameters import ScaledParameter, adopt, lacks_scale
from ada_loss.chainer.products import backward_arrays, enters_float16, input_gradient, products_of
from ada_loss.chainer.tagging import Tag, communicates, tag_of
from ada_loss.chainer.user_functions import is_users, users_gradients

Inputs = list[tuple[VariableNode, ScaledGradient]]

VANISHED = (
    "The gradient of an input underflows: float16 holds nothing but zeros of it in `.grad`. chainer.grad "
    "gives it in float32."
)
UNSCALED = (
    "Gradients that are to be differentiated again (enable_double_backprop) are not scaled: float16 loses "
    "small ones. Compute that part of the model in float32."
)


class BackwardPass:
    """One pass over a graph: gradients that have arrived, functions that wait, leaves that were reached.

    unscaled: whether it goes on with gradients from a pass that knows no scales.
    """

    def __init__(self, *, retain_grad: bool = False, unscaled: bool = False) -> None:
        self._retain_grad = retain_grad
        self._unscaled = unscaled
        self._gradients: dict[VariableNode, list[ScaledGradient]] = {}
        self._waiting: list[tuple[int, int, Any]] = []
        self._seen: set[Any] = set()
        self._leaves: dict[VariableNode, bool] = {}
        self._through_scopes: set[VariableNode] = set()

    def run(
        self,
        outputs: Iterable[tuple[VariableNode, ScaledGradient | None]],
        tag: Tag | None = None,
        starts: Iterable[VariableNode] | None = None,
    ) -> None:
        """Go from `outputs` to the leaves; tag: that of the function whose gradients these are, if any.

        starts: the nodes from which to go, where not from all that have a gradient.
        """
        nodes = []
        for node, gradient in outputs:
            nodes.append(node)
            if gradient is not None:
                self._arrive(node, gradient, tag)
        for node in nodes if starts is None else starts:
            self._enqueue(node.creator_node)
        while self._waiting:
            _, _, function = heapq.heappop(self._waiting)
            self._visit(function)

    def pop(self, node: VariableNode | None) -> ScaledGradient | None:
        """The gradient of a node, which is forgotten here; None where none has arrived."""
        gradients = self._gradients.pop(node, None)
        return _total(node, gradients) if gradients else None

    def finish(self) -> None:
        """Hand their gradients to the leaves: scaled to parameters that a scope uses, true to others."""
        for leaf, scoped in self._leaves.items():
            variable, gradient = leaf.get_variable_or_none(), self.pop(leaf)
            if variable is None or gradient is None:
                continue
            if isinstance(variable, ScaledParameter):
                variable.receive(gradient, backward_state.loss_scale(), scoped=scoped)
                if self._unscaled or leaf not in self._through_scopes:
                    variable.unscaled |= lacks_scale(variable)
            elif isinstance(variable, chainer.Parameter) and (scoped or gradient.exponent):
                # Without a scope in this pass, what the gradient was added to was scaled.
                adopt(variable).receive(gradient, backward_state.loss_scale(), scoped=scoped)
            else:
                _give(variable, gradient)

    def _visit(self, function: Any) -> None:
        outputs = [reference() for reference in function.outputs]
        gys = [None if y is None or y.creator_node is None else self.pop(y) for y in outputs]
        targets = self._targets(function)
        if not targets:
            return
        running_statistics.went_through(function)
        tag = tag_of(function)
        arrays, exponent = _aligned(gys if tag else [_outside(function, gy) for gy in gys], tag)
        del gys
        with hooked(function, arrays, exponent) as (arrays, exponent):
            for index in targets:
                self._reach(function.inputs[index])
            found = _gradients(function, targets, arrays, exponent, tag)
        self._show(function, arrays, exponent, found)
        if chainer.is_debug() and any(chainer.backend._contains_nan(gx.array) for _, gx in found):
            raise RuntimeError(f"NaN is detected on backward computation of {function.label}")
        if self._retain_grad:
            self._retain(outputs, arrays, exponent)
        if tag is not None or not self._through_scopes.isdisjoint(outputs):
            self._through_scopes.update(node for node, _ in found)
        for node, gx in found:
            _check_grad_type(function, node, True, gx.array)
            self._arrive(node, gx, tag)
        for node in dict.fromkeys(node for node, _ in found):
            if not function.lazy_grad_sum and len(self._gradients[node]) > 1:
                self._gradients[node] = [_total(node, self._gradients[node], tag)]
            self._enqueue(node.creator_node)

    def _targets(self, function: Any) -> tuple[int, ...]:
        return tuple(index for index, x in enumerate(function.inputs) if x.requires_grad)

    def _present(self, leaf: VariableNode) -> list[ScaledGradient]:
        return _take_present(leaf)

    def _show(self, function: Any, gys: tuple[Any, ...], exponent: int, found: Inputs) -> None:
        origin.look(function, gys, found)
        observing.look(function, exponent, found)

    def _retain(self, outputs: list[Any], gys: tuple[Any, ...], exponent: int) -> None:
        for y, gy in zip(outputs, gys, strict=True):
            if y is not None:
                gradient = None if gy is None else _at_exponent_around(ScaledGradient(gy, exponent))
                y._set_grad_var_if_available(gradient and chainer.Variable(gradient.array))

    def _arrive(self, node: VariableNode, gradient: ScaledGradient, tag: Tag | None) -> None:
        creator = node.creator_node
        if creator is None:
            self._reach(node)
            self._leaves[node] |= tag is not None
        elif tag is None and not gradient.exponent and (inside := tag_of(creator)) is not None:
            exponent = inside.scope.entry_exponent
            backward_state.note_entry(inside.scope.policy)
            gradient = ScaledGradient(shifted(gradient.array, exponent), exponent)
        self._gradients.setdefault(node, []).append(gradient)

    def _reach(self, node: VariableNode) -> None:
        """Take what a leaf has before anything is added to it, as Chainer does before each backward."""
        if node.creator_node is None and node not in self._leaves:
            self._gradients[node] = self._present(node)
            self._leaves[node] = False

    def _enqueue(self, function: Any) -> None:
        if function is not None and function not in self._seen:
            heapq.heappush(self._waiting, (-function.rank, len(self._seen), function))
            self._seen.add(function)


def _total(node: Any, gradients: list[ScaledGradient], tag: Tag | None = None) -> ScaledGradient:
    """The sum of a variable's gradients; that of a parameter, which has no room to spare, in float32."""
    if len(gradients) == 1:
        return gradients[0]
    wide = isinstance(node.get_variable_or_none(), chainer.Parameter)
    return add(gradients, _accumulation(tag), wide=wide)


def _take_present(leaf: VariableNode) -> list[ScaledGradient]:
    """The gradient that a leaf has from earlier passes, which is to be added to; the leaf gives it up."""
    variable = leaf.get_variable_or_none()
    if isinstance(variable, chainer.Parameter):
        present = adopt(variable).take(backward_state.loss_scale())
        return [] if present is None else [present]
    if variable is None or variable.grad_var is None:
        return []
    exponent = backward_state.exponent() if backward_state.changes().gave(variable) else 0
    array, variable.grad_var = variable.grad_var.array, None
    return [ScaledGradient(array, exponent)]


def _give(leaf: chainer.Variable, gradient: ScaledGradient) -> None:
    """Set the gradient of a leaf that is no parameter, as the code that started this pass sees gradients."""
    before = leaf.grad
    # Passes inside this one may have reached the leaf as well.
    total = add([gradient, *_take_present(leaf.node)])
    array = _at_exponent_around(total).array
    if isinstance(array, np.ndarray) and array is not total.array and total.array.any() and not array.any():
        warnings.warn(VANISHED, stacklevel=5)
    leaf._set_grad_var_without_check(chainer.Variable(array))
    backward_state.changes().give(leaf, before, array)


def _accumulation(tag: Tag | None) -> Accumulation:
    """What is known of gradients that meet at a function."""
    return UNKNOWN_PLACE if tag is None else tag.scope.policy.accumulation()


def _aligned(gys: list[ScaledGradient | None], tag: Tag | None) -> tuple[tuple[Any, ...], int]:
    present = [gy for gy in gys if gy is not None]
    if not present:
        return (None,) * len(gys), 0
    if len(present) == 1:
        return tuple(gy and gy.array for gy in gys), present[0].exponent
    arrays, exponent = align(present, _accumulation(tag))
    remaining = iter(arrays)
    return tuple(None if gy is None else next(remaining) for gy in gys), exponent


def _gradients(
    function: Any, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int, tag: Tag | None
) -> Inputs:
    """The gradients of those inputs `targets` that have one, in order."""
    if isinstance(function, Forget):
        return _forgotten(function, targets, gys, exponent, tag)
    if tag is not None and communicates(function):
        raise RuntimeError(
            f"{function.label} sends gradients to other processes, which know nothing of their scale: "
            "keep it outside AdaLossScaled."
        )
    gys, exponent = _agreed_over_processes(function, gys, exponent)
    gys, exponent = _at_fixed_scale(gys, exponent, tag)
    if is_users(function):
        scales_sums = tag is not None and tag.scope.scales_sums(tag.point)
        headroom = _accumulation(tag).headroom
        gxs, exponent = users_gradients(
            function, targets, gys, exponent, headroom=headroom, retreats=scales_sums
        )
        return _with_nodes(function, targets, gxs, exponent)
    found: dict[int, tuple[Any, int]] = {}
    if tag is not None and tag.point is not None and gys[0] is not None:
        found = _decided(function, targets, gys[0], exponent, tag)
    plain = tuple(index for index in targets if index not in found)
    if tag is not None and tag.scope.scales_sums(tag.point) and _communicator(function) is None:
        gxs, exponent = gradients_in_range(function, plain, gys, exponent)
    else:
        gxs = backward_arrays(function, plain, gys)
    found.update((index, (gx, exponent)) for index, gx in zip(plain, gxs, strict=True))
    present = [index for index in targets if found[index][0] is not None]
    return [(function.inputs[index], ScaledGradient(*found[index])) for index in present]


def _with_nodes(function: Any, targets: tuple[int, ...], gxs: tuple[Any, ...], exponent: int) -> Inputs:
    pairs = zip(targets, gxs, strict=True)
    return [(function.inputs[index], ScaledGradient(gx, exponent)) for index, gx in pairs if gx is not None]


def _decided(
    function: Any, targets: tuple[int, ...], gy: Any, exponent: int, tag: Tag
) -> dict[int, tuple[Any, int]]:
    """The gradients of those inputs for which a decision point chooses a shift, and their exponents.

    One that needs no treatment of its own is left to be computed with the other gradients.
    """
    if enters_float16(function):
        shift = tag.scope.choose_for_cast(tag.point, gy, exponent).shift
        return {0: (shifted(gy, shift, np.float16), exponent + shift)}
    found = {}
    scales_sums = tag.scope.scales_sums(tag.point)
    for product in products_of(function):
        if product.data in targets:
            chosen = tag.scope.choose_for_product(tag.point, function, product, gy, exponent)
            if chosen.shift or scales_sums:
                gx = input_gradient(function, product, gy, chosen.shift, chosen.range.max_weight_shift)
                found[product.data] = (gx, exponent + chosen.shift)
    if scales_sums:
        backoff = tag.scope.policy.entry.backoff
        found.update(parameter_gradients(function, targets, gy, exponent, backoff))
    return found


def _forgotten(
    function: Forget, targets: tuple[int, ...], gys: tuple[Any, ...], exponent: int, tag: Tag | None
) -> Inputs:
    """Recompute a forgotten part and go on through it; other leaves that it uses get their gradients here."""
    inputs = tuple(chainer.Variable(x.array) for x in function.get_retained_inputs())
    recorder = tag.scope.recorder() if tag and tag.by_call else nullcontext()
    with chainer.force_backprop_mode(), chainer.using_config("in_recomputing", True), recorder:
        outputs = _call_func(function.func, inputs)
    tag_graph((y.node, None) for y in outputs)
    inner = BackwardPass()
    entries = zip(outputs, gys, strict=True)
    inner.run(((y.node, ScaledGradient(gy, exponent)) for y, gy in entries if gy is not None), tag)
    found = [(function.inputs[index], inner.pop(inputs[index].node)) for index in targets]
    inner.finish()
    return [(node, gx) for node, gx in found if gx is not None]


def _at_fixed_scale(gys: tuple[Any, ...], exponent: int, tag: Tag | None) -> tuple[tuple[Any, ...], int]:
    """Gradients that arrive at a decision point, at its own scale if it has a fixed one."""
    fixed = tag.scope.policy.fixed_exponent(tag.point) if tag is not None and tag.point is not None else None
    if fixed is None:
        return gys, exponent
    return tuple(None if gy is None else shifted(gy, fixed - exponent) for gy in gys), fixed


def _agreed_over_processes(function: Any, gys: tuple[Any, ...], exponent: int) -> tuple[tuple[Any, ...], int]:
    """Where a function averages over processes on the way back, all of them have to bring one exponent."""
    communicator = _communicator(function)
    if communicator is None or gys[0] is None:
        return gys, exponent
    backward_state.note_communication()
    agreed = at_agreed_exponent(ScaledGradient(gys[0], exponent), communicator)
    return (agreed.array, *gys[1:]), agreed.exponent


def _communicator(function: Any) -> Any:
    """That of a function which averages over processes, in which all of them take part equally often."""
    return getattr(getattr(function, "_impl_selector", None), "comm", None)


def _at_exponent_around(gradient: ScaledGradient) -> ScaledGradient:
    """A gradient as the code that started this pass sees gradients: true, unless that runs inside a pass."""
    exponent = backward_state.exponent()
    return ScaledGradient(shifted(gradient.array, exponent - gradient.exponent), exponent)


def _outside(function: Any, gradient: ScaledGradient | None) -> ScaledGradient | None:
    """What a function outside every scope is given: the true gradient, except where float16 would lose it."""
    if gradient is None or gradient.array.dtype == np.float16 and not communicates(function):
        return gradient
    return _at_exponent_around(gradient)


def is_ours(outputs: Any, loss_scale: float | None) -> bool:
    """Whether a pass from `outputs` (pairs of nodes and gradients) is for this engine and not for Chainer's.

    Gradients that are to be differentiated again are Chainer's: unscaled, of which a warning tells where they
    are float16. A RuntimeError if they have a loss scale, which the second pass would not know of.
    """
    if not chainer.config.enable_backprop:
        return backward_state.is_noted() or any(True for _ in in_scopes(outputs))
    scoped = list(in_scopes(outputs))
    if scoped and loss_scale not in (None, 1):
        raise RuntimeError("Double backpropagation through AdaLossScaled takes no loss scale: leave it out.")
    if any(x.dtype == np.float16 for function in scoped for x in function.inputs):
        warnings.warn(UNSCALED, stacklevel=4)
    return False


# This module may be reloaded, when its engine is installed already.
_chainers_engine = inspect.unwrap(_backprop._backprop_to_all)


@functools.wraps(_chainers_engine)
def _backprop_to_all(outputs: Any, retain_grad: bool, loss_scale: float | None) -> None:
    if chainer.config.enable_backprop:
        is_ours(outputs, loss_scale)
        _chainers_engine(outputs, retain_grad, loss_scale)
    elif not is_ours(outputs, loss_scale):
        observing.before_pass(outputs, loss_scale, ours=False)
        with backward_state.noted(loss_scale, chainers=True):
            _chainers_engine(outputs, retain_grad, loss_scale)
    else:
        unscaled = backward_state.in_chainers_engine()
        with backward_state.noted(loss_scale), origin.backward_from(node for node, _ in outputs):
            tag_graph(outputs)
            observing.before_pass(outputs, loss_scale, ours=True)
            this = BackwardPass(retain_grad=retain_grad, unscaled=unscaled)
            exponent = backward_state.exponent()
            this.run((y, None if gy is None else ScaledGradient(gy.array, exponent)) for y, gy in outputs)
            this.finish()


def install() -> None:
    """Make `Variable.backward`, `chainer.backward` and `F.forget` use this engine."""
    _backprop._backprop_to_all = _backprop_to_all
