"""A parameter whose gradient stays scaled until the optimizer asks for the true one.

A scope leaves a parameter's gradient in flight: in float16 with an exponent, since dividing the scale out in float16
would underflow again. `ScaledParameter` is Chainer's `Parameter` with a place for that. Existing parameters become
one by `adopt`: they stay the same objects, with their names, initializers, update rules and hooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import chainer
import numpy as np

from ada_loss.chainer.gradient import InFlight, add, shifted

UNPREPARED = (
    "The gradient of parameter {name} is still scaled: call ada_loss.chainer.prepare(optimizer) after "
    "optimizer.setup(model), or update by hand with model.true_gradients()."
)

_PENDING = object()


class OuterScale:
    """The loss scale of one backward pass around a scope, known once that pass has ended.

    Chainer publishes it by setting `_loss_scale` on every leaf that it visited; `leaf` is one that each pass through
    the scope visits.
    """

    def __init__(self, leaf: chainer.Variable) -> None:
        leaf._loss_scale = _PENDING
        self._leaf: chainer.Variable | None = leaf
        self._value = 1.0

    @classmethod
    def none(cls) -> OuterScale:
        """No scale at all, from the beginning."""
        scale = cls(chainer.Variable())
        scale._leaf = None
        return scale

    @property
    def known(self) -> bool:
        return self._leaf is None or self._leaf._loss_scale is not _PENDING

    @property
    def value(self) -> float:
        """The scale; a RuntimeError if the backward pass has not come to its end."""
        if not self.known:
            raise RuntimeError(
                "A backward pass through AdaLossScaled did not reach its end: call cleargrads() and repeat it."
            )
        return self._value if self._leaf is None else float(self._leaf._loss_scale or 1)

    def freeze(self) -> None:
        """Keep the value, so that the leaf can serve the next pass."""
        self._value, self._leaf = self.value, None

    def agrees(self, other: OuterScale) -> bool:
        """Whether both are surely the same scale."""
        return self is other or (self.known and other.known and self.value == other.value)


class OuterScaleTracker:
    """Keeps the leaf that the calls of one wrapped link share, and tells backward passes apart."""

    def __init__(self) -> None:
        self._leaf = chainer.Variable(np.zeros((), np.float32))
        self._current = OuterScale(self._leaf)

    def leaf_for(self, device: Any) -> chainer.Variable:
        """The leaf, on a device."""
        self._leaf.to_device(device)
        return self._leaf

    def zero(self) -> Any:
        """A gradient for the leaf, so that a pass visits it."""
        return self._leaf.xp.zeros((), np.float32)

    def this_pass(self) -> OuterScale:
        """The loss scale of the pass that runs now."""
        if self._current.known:
            self._current.freeze()
            self._current = OuterScale(self._leaf)
        return self._current


class ScaledParameter(chainer.Parameter):
    """A parameter with gradients in flight. `.grad` reads as the true gradient, in float32.

    A gradient that reaches the parameter from outside every scope stays where Chainer puts it; the true gradient is
    the sum of both.
    """

    _in_flight: tuple[tuple[InFlight, OuterScale], ...] = ()
    _exposed = False
    master: Any = None
    """float32 values of a float16 parameter, kept by a prepared optimizer; None before its first update."""

    @property
    def in_flight(self) -> bool:
        """Whether a gradient from a scope waits for the optimizer."""
        return bool(self._in_flight) and not self._exposed

    def receive(self, gradient: InFlight, outer: OuterScale) -> None:
        """Add a gradient from a scope, without modifying any array."""
        held = list(self._in_flight)
        for index, (present, scale) in enumerate(held):
            if scale.agrees(outer):
                held[index] = (add([present, gradient]), scale)
                break
        else:
            held.append((gradient, outer))
        if len(held) > 2:
            held = _merge_agreeing(held)
        self._in_flight = tuple(held)

    def true_gradient(self) -> Any:
        """The gradient without any scale: float32 (float64 for a float64 parameter), a new array; None if none."""
        parts = [(gradient, scale.value) for gradient, scale in self._in_flight]
        outside = self._outside()
        if outside is not None:
            parts.append((InFlight(outside), float(self._loss_scale or 1)))
        if not parts:
            return None
        with chainer.using_device(self.device):
            total, *rest = [_true(gradient, scale) for gradient, scale in parts]
            for part in rest:
                total = total + part
            return total

    def arrays(self) -> list[Any]:
        """Every array that the gradient is the sum of."""
        outside = self._outside()
        return [gradient.array for gradient, _ in self._in_flight] + ([] if outside is None else [outside])

    def collapsed(self) -> InFlight | None:
        """Everything as one gradient in flight, without the loss scale around the scope; nothing is modified."""
        held = [_without_scale(gradient, scale.value) for gradient, scale in self._in_flight]
        outside = self._outside()
        if outside is not None:
            held.append(_without_scale(InFlight(outside), float(self._loss_scale or 1)))
        return add(held) if held else None

    def hold(self, gradient: InFlight) -> None:
        """Make this the parameter's whole gradient."""
        self._set_grad_without_check(None)
        self._in_flight = ((gradient, OuterScale.none()),)

    def lend(self, array: Any) -> None:
        """Show `array` as the plain gradient, for a communicator to average in place; `reclaim` ends it."""
        self._drop()
        self._set_grad_without_check(array)

    def reclaim(self, exponent: int) -> None:
        """Take the averaged array back as a gradient in flight."""
        array = self._outside()
        if array is not None:
            self.hold(InFlight(array, exponent))

    def cleargrad(self) -> None:
        self._drop()
        super().cleargrad()

    def zerograd(self) -> None:
        self._drop()
        super().zerograd()

    def addgrad(self, var: chainer.Variable) -> None:
        """Add the gradient of another variable, with whatever scale it carries."""
        if not self.in_flight and not (isinstance(var, ScaledParameter) and var.in_flight):
            super().addgrad(var)
            return
        other = var.true_gradient() if isinstance(var, ScaledParameter) else _true(InFlight(var.grad), 1.0)
        if other is None:
            return
        if self.array is None:
            self.initialize(var.shape)
        mine = self.true_gradient()
        total = self.device.send(other) if mine is None else mine + self.device.send(other)
        self.hold(InFlight(total))

    def to_device(self, device: Any) -> None:
        device = chainer.get_device(device)
        super().to_device(device)
        self._in_flight = tuple(
            (InFlight(device.send(gradient.array), gradient.exponent), scale) for gradient, scale in self._in_flight
        )
        if self.master is not None:
            self.master = device.send(self.master)

    def update(self) -> None:
        if self.in_flight:
            raise RuntimeError(UNPREPARED.format(name=self.name))
        super().update()

    def _get_grad(self) -> Any:
        return self.true_gradient() if self.in_flight else super()._get_grad()

    def _set_grad(self, g: Any, *, layout_check: bool = True) -> None:
        if self.in_flight:
            raise RuntimeError(UNPREPARED.format(name=self.name))
        super()._set_grad(g, layout_check=layout_check)

    def _outside(self) -> Any:
        return super()._get_grad() if self._grad_valid else None

    def _drop(self) -> None:
        self._in_flight = ()

    def __copy__(self) -> ScaledParameter:
        return self._copy_to(ScaledParameter())

    def __reduce__(self) -> tuple[Any, ...]:
        held = [_without_scale(gradient, scale.value) for gradient, scale in self._in_flight]
        return _recover, (super().__reduce__(), add(held) if held else None, self.master)


def adopt(parameter: chainer.Parameter) -> ScaledParameter:
    """Give an existing parameter a place for gradients in flight; it stays the same object."""
    if not isinstance(parameter, ScaledParameter):
        parameter.__class__ = ScaledParameter
    return parameter


@contextmanager
def true_gradients_on_masters(parameters: Iterable[ScaledParameter]) -> Iterator[None]:
    """Within it every parameter is its float32 master with its true gradient, without any scale.

    Optimizers and hooks need not know of float16: what they see is float32 training. At the end the float16 arrays
    receive the rounded masters, in place, and the gradients are back in flight.
    """
    exposed = []
    try:
        for parameter in parameters:
            if parameter.array is not None:
                exposed.append((parameter, _expose(parameter)))
        yield
    finally:
        for parameter, before in exposed:
            _conceal(parameter, *before)


def _expose(parameter: ScaledParameter) -> tuple[Any, Any, Any]:
    before = (parameter.array, parameter._grad if parameter._grad_valid else None, parameter._loss_scale)
    gradient = parameter.true_gradient()
    parameter._exposed = True
    parameter._loss_scale = None
    if parameter.array.dtype == np.float16:
        parameter.master = _reconciled(parameter.master, parameter.array)
        parameter.array = parameter.master
    parameter._set_grad_without_check(gradient)
    return before


def _conceal(parameter: ScaledParameter, half: Any, outside: Any, loss_scale: Any) -> None:
    if half.dtype == np.float16:
        parameter.master = parameter.array
        half[...] = parameter.master.astype(np.float16)
        parameter.array = half
    parameter._exposed = False
    parameter._set_grad_without_check(outside)
    parameter._loss_scale = loss_scale


def _reconciled(master: Any, half: Any) -> Any:
    """The master, except where the parameter was changed behind it (a file loaded, weights copied or clipped)."""
    if master is None:
        return half.astype(np.float32)
    xp = chainer.backend.get_array_module(half)
    return xp.where(master.astype(np.float16) == half, master, half.astype(np.float32))


def _merge_agreeing(held: list[tuple[InFlight, OuterScale]]) -> list[tuple[InFlight, OuterScale]]:
    merged: list[tuple[InFlight, OuterScale]] = []
    for gradient, scale in held:
        for index, (present, known) in enumerate(merged):
            if known.agrees(scale):
                merged[index] = (add([present, gradient]), known)
                break
        else:
            merged.append((gradient, scale))
    return merged


def _true(gradient: InFlight, scale: float) -> Any:
    """The true gradient as a new array of at least float32."""
    wide = gradient.array.astype(np.promote_types(gradient.array.dtype, np.float32))
    unscaled = shifted(wide, -gradient.exponent)
    return unscaled if scale == 1 else unscaled / unscaled.dtype.type(scale)


def _without_scale(gradient: InFlight, scale: float) -> InFlight:
    """Divide a loss scale out: its power of two goes into the exponent, only a factor in [1, 2) into the array."""
    exponent = math.frexp(scale)[1] - 1
    factor = math.ldexp(scale, -exponent)
    if factor == 1:
        return InFlight(gradient.array, gradient.exponent + exponent)
    wide = gradient.array.astype(np.promote_types(gradient.array.dtype, np.float32))
    divided = (wide / wide.dtype.type(factor)).astype(gradient.array.dtype)
    return InFlight(divided, gradient.exponent + exponent)


def _recover(plain: tuple[Any, ...], gradient: InFlight | None, master: Any) -> ScaledParameter:
    make, arguments = plain
    parameter = adopt(make(*arguments))
    outside = parameter._outside()
    if gradient is not None:
        parameter.hold(gradient)
        parameter._set_grad_without_check(outside)
    parameter.master = master
    return parameter
