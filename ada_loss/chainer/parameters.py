"""A parameter whose gradient stays scaled until the optimizer asks for the true one.

A scope leaves a parameter's gradient scaled: in float16 with an exponent, since dividing the scale out in
float16 would underflow again. `ScaledParameter` is Chainer's `Parameter` with a place for that. Existing
parameters become one by `adopt`: they stay the same objects, with their names, initializers, update rules and
hooks.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import chainer
import numpy as np
from chainer.variable import _allow_array_access_with_nonstandard_layout

from ada_loss.chainer import backward_state
from ada_loss.chainer.gradient import ScaledGradient, shifted
from ada_loss.chainer.held import TRUE, Carried, Held

Gradient = tuple[Held | None, Any]
"""What a parameter has scaled, and what in Chainer's own place for gradients; None stands for nothing."""

State = dict[str, Any]
"""All of a parameter that makes up its gradient."""

_STATE = ("_scaled", "_grad", "_grad_var", "_grad_valid", "_scoped")
"""The attributes that make up a parameter's gradient."""

UNPREPARED = (
    "The gradient of parameter {name} is still scaled: call ada_loss.chainer.prepare(optimizer) after "
    "optimizer.setup(model), or update by hand with model.true_gradients()."
)


class Access(Enum):
    """Who looks at a parameter's gradient at the moment."""

    ANYBODY = "code, which is shown the true gradient"
    UPDATE = "an optimizer at work, and hooks after it"
    UPDATE_ONCE = "an optimizer at work, and nobody after the parameter's own update"
    AVERAGE = "a communicator, which averages over processes in place"


class ScaledParameter(chainer.Parameter):
    """A parameter with scaled gradients. `.grad` reads as the true gradient, in float32.

    What has been read from `.grad`, or assigned to it, is the gradient from then on, so it may be clipped in
    place. Gradients from outside every scope are kept scaled as well, with the loss scale of their
    backward pass: passes with different scales add up correctly.

    Code that runs inside a backward pass (a function of the user's own, a hook) reads and writes gradients
    that carry what those carry that it is handed: see `backward_state.carrying`.
    """

    _scaled: Held | None = None
    """The gradient as long as nobody has asked for the true one; its array is never modified in place."""

    _scoped = False
    """Whether a scope contributed since the gradient was cleared, so that only a prepared optimizer may use
    it."""

    _access = Access.ANYBODY
    """Who looks at it: to an optimizer and a communicator the parameter behaves as Chainer's own."""

    unscaled = False
    """Whether float16 gradients have arrived, since they were cleared, that nothing has scaled."""

    home: Any = None
    """Where the parameter is, once that has been asked (`ownership.Home`)."""

    master: Any = None
    """float32 values of a float16 parameter, kept by a prepared optimizer; None before its first update."""

    def receive(self, gradient: ScaledGradient, loss_scale: float, *, scoped: bool = True) -> None:
        """Add a gradient, which carries `loss_scale` besides its exponent; no array is modified.

        scoped: whether a scope contributed to it.
        """
        self._note_change()
        self._scoped |= scoped
        self._add(gradient, loss_scale)

    def take(self, loss_scale: float) -> ScaledGradient | None:
        """Give up the present gradient, where a pass with `loss_scale` is to add to it, in Chainer's order.

        In float16 it is not: the sums of several passes are kept in float32.
        """
        present = self._present()
        if present is None or self.dtype == np.float16:
            return None
        carried = Carried.of(loss_scale)
        if present.factor != carried.factor or present.dtype != self.dtype:
            return None
        self._note_change()
        self._hold(None)
        return ScaledGradient(present.gradient.array, present.gradient.exponent - carried.exponent)

    def true_gradient(self) -> Any:
        """The gradient without any scale: float32 (float64 for a float64 parameter), a new array; None if
        none."""
        present = self._present()
        if present is None:
            return None
        with chainer.using_device(self.device):
            return present.true()

    def arrays(self) -> list[Any]:
        """Arrays that are finite exactly if the true gradient is."""
        present = self._present()
        if present is None:
            return []
        with chainer.using_device(self.device):
            return [present.as_finite()]

    def fill(self) -> None:
        """Hold zeros where there is no gradient, without an array of their size."""
        if self._present() is None:
            with chainer.using_device(self.device):
                zero = self.xp.zeros((), np.promote_types(self.dtype, np.float32))
                self._scaled = Held(ScaledGradient(self.xp.broadcast_to(zero, self.shape)))

    def update(self) -> None:
        held = self._scaled if self._access is Access.UPDATE_ONCE else None
        super().update()
        if held is not None:
            self._hold(held)

    def expose_to_update(self, *, once: bool) -> Gradient:
        """Behave as Chainer's own, for an optimizer, until `conceal` takes what this returns.

        once: whether the true gradient is given up after the parameter's own update.
        """
        before = self._scaled, self._settled()
        self._hold(self._present())
        self._access = Access.UPDATE_ONCE if once else Access.UPDATE
        return before

    def conceal(self, before: Gradient) -> None:
        """Hold the gradient from before an update again."""
        held, settled = before
        self._set_grad_without_check(settled)
        self._scaled, self._access = held, Access.ANYBODY

    def expose_for_average(self, array: Any) -> None:
        """Show `array` as a plain gradient of Chainer's, for a communicator to average in place, until
        `accept_average`."""
        self._scaled, self._access = None, Access.AVERAGE
        self._set_grad_without_check(array)

    def accept_average(self, exponent: int) -> None:
        """Take the averaged array, which carries `exponent`, as the gradient."""
        array = self._settled()
        self._access = Access.ANYBODY
        if array is not None:
            self._set_grad_without_check(shifted(array, -exponent))

    def cleargrad(self) -> None:
        self._forget_scopes()
        super().cleargrad()

    def zerograd(self) -> None:
        self._forget_scopes()
        super().zerograd()

    def addgrad(self, var: chainer.Variable) -> None:
        """Add the true gradient of another variable."""
        other = var.grad
        if other is None:
            return
        if self.array is None:
            self.initialize(var.shape)
        mine, other = self._get_grad(), self.device.send(other)
        with chainer.using_device(self.device):
            wide = other.astype(np.promote_types(other.dtype, np.float32))
            self._set_grad(wide if mine is None else mine + wide)
        self._scoped = self._scoped or getattr(var, "_scoped", False)

    def to_device(self, device: Any) -> None:
        super().to_device(device)
        if self.master is not None:
            self.master = self.device.send(self.master)

    def exchange(self, held: State | None = None) -> State:
        """What makes up the gradient at the moment; `held`, from another moment, takes its place if given."""
        now = {name: getattr(self, name) for name in _STATE}
        if held is not None:
            self.__dict__.update(held)
        return now

    @property
    def grad_var(self) -> chainer.Variable | None:
        if backward_state.in_chainers_engine():
            # It would take the gradient for a part of what it computes, with the same scale, and add to it.
            return None
        if _carried() != TRUE:
            array = self._show()
            return None if array is None else chainer.Variable(array)
        self._settle()
        return super().grad_var

    @grad_var.setter
    def grad_var(self, g: chainer.Variable | None) -> None:
        if g is None or not self._takes_wider(g.array):
            chainer.Parameter.grad_var.fset(self, g)
        else:
            self._set_grad_var_without_check(g)

    @property
    def _loss_scale(self) -> None:
        """Chainer's optimizers divide by this, and need not: what they see is true."""

    @_loss_scale.setter
    def _loss_scale(self, scale: float | None) -> None:
        pass

    def _get_grad(self) -> Any:
        if self._scoped and self._access is Access.ANYBODY and _allow_array_access_with_nonstandard_layout():
            # Only optimizers and update rules look at gradients this way, before they do anything else.
            raise RuntimeError(UNPREPARED.format(name=self.name))
        return self._show()

    def _set_grad(self, g: Any, *, layout_check: bool = True) -> None:
        self._note_change()
        self._scaled = None
        if g is None or not self._takes_wider(g):
            super()._set_grad(g, layout_check=layout_check)
        else:
            self._set_grad_without_check(g)
        self._take_as_carrying(g)

    def _takes_wider(self, array: Any) -> bool:
        """Whether an array is of a wider format than the parameter; a ValueError if it has another shape."""
        if array.dtype.kind != "f" or array.dtype.itemsize <= self.dtype.itemsize:
            return False
        if array.shape != self.shape:
            raise ValueError(
                f"A gradient of shape {array.shape} does not fit parameter {self.name} of {self.shape}."
            )
        return True

    def _set_grad_var_without_check(self, gv: chainer.Variable | None) -> None:
        self._note_change()
        if not backward_state.in_chainers_engine():
            self._scaled = None
            super()._set_grad_var_without_check(gv)
            self._take_as_carrying(None if gv is None else gv.array)
        elif gv is not None:
            self.unscaled |= lacks_scale(gv.array)
            self._add(ScaledGradient(gv.array), backward_state.loss_scale())

    def _show(self) -> Any:
        """The gradient for code to read, and to change in place: true but for what it carries there."""
        self._note_change()
        carried = _carried()
        if carried == TRUE:
            self._settle()
            return super()._get_grad()
        held = self._present()
        if held is None:
            return None
        if not held.shown or held.carried != carried:
            with chainer.using_device(self.device):
                held = Held.of(held.carrying(carried), carried, shown=True)
            self._hold(held)
        return held.gradient.array

    def _take_as_carrying(self, array: Any) -> None:
        """Take an array that code has just assigned for what it is there."""
        carried = _carried()
        if array is not None and carried != TRUE:
            self._hold(Held.of(array, carried, shown=True))
            self._scoped |= carried.exponent != 0 and self.home is not None

    def _note_change(self) -> None:
        """Keep what the gradient is, if code is running whose changes may be undone."""
        if backward_state.changes().keep(self, self.exchange()):
            # What is kept must not be changed in place.
            if self._scaled is not None:
                self._scaled = self._scaled._replace(shown=False)
            if (settled := self._settled()) is not None:
                self._set_grad_without_check(settled.copy())

    def _add(self, gradient: ScaledGradient, loss_scale: float) -> None:
        carried = Carried.of(loss_scale, gradient.exponent)
        present, new = self._present(), Held.of(gradient.array, carried)
        if present is None:
            self._hold(new)
            return
        with chainer.using_device(self.device):
            self._hold(present.plus(new))

    def _present(self) -> Held | None:
        """The gradient as it is: scaled, or true in Chainer's own place for gradients."""
        if self._scaled is not None:
            return self._scaled
        settled = self._settled()
        return None if settled is None else Held(ScaledGradient(settled))

    def _hold(self, held: Held | None) -> None:
        self._set_grad_without_check(None)
        self._scaled = held

    def _settled(self) -> Any:
        """The gradient if it is true already, in Chainer's own place for gradients."""
        return super()._get_grad() if self._grad_valid else None

    def _settle(self) -> None:
        if self._scaled is not None:
            true = self.true_gradient()
            self._scaled = None
            self._set_grad_without_check(true)

    def _forget_scopes(self) -> None:
        self._note_change()
        self._scaled, self._scoped, self.unscaled = None, False, False

    def __copy__(self) -> ScaledParameter:
        return self._copy_to(type(self)())

    def __reduce__(self) -> tuple[Any, ...]:
        self._settle()
        return _recover, (super().__reduce__(), self.master, self._scoped)


def lacks_scale(values: Any) -> bool:
    """Whether an array that has come through no scope is float16, and its pass has no loss scale either."""
    return bool(values.dtype == np.float16 and backward_state.loss_scale() == 1)


_SCALED: dict[type, type] = {chainer.Parameter: ScaledParameter}


def adopt(parameter: chainer.Parameter) -> ScaledParameter:
    """Give an existing parameter a place for scaled gradients; it stays the same object."""
    if not isinstance(parameter, ScaledParameter):
        plain = type(parameter)
        if plain not in _SCALED:
            _SCALED[plain] = type(f"Scaled{plain.__name__}", (ScaledParameter, plain), {})
        scale = vars(parameter).pop("_loss_scale", None)
        parameter.__class__ = _SCALED[plain]
        if scale is not None and (array := parameter._settled()) is not None:
            parameter._set_grad_without_check(Held(ScaledGradient(array), scale).true())
    return parameter


def _carried() -> Carried:
    """What gradients carry which user code reads and writes at the moment."""
    return Carried.of(backward_state.loss_scale(), backward_state.exponent())


def _recover(plain: tuple[Any, ...], master: Any, scoped: bool) -> ScaledParameter:
    make, arguments = plain
    parameter = adopt(make(*arguments))
    parameter.master, parameter._scoped = master, scoped
    return parameter
