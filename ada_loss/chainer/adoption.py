"""Parameters that are in no scaled model, and that a function's backward gives scaled gradients all the same.

Chainer's own parameter has no place for an exponent. So where its gradient is read or written by code that is
handed scaled gradients, it is adopted first.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import chainer

from ada_loss.chainer import backward_state
from ada_loss.chainer.parameters import ScaledParameter, adopt

_METHODS = ("_get_grad", "_set_grad", "_set_grad_var_without_check")
"""By which a variable's gradient is read and written."""


def install() -> None:
    """Have parameters adopted from now on."""
    for name in _METHODS:
        setattr(chainer.Parameter, name, _adopting(name))
    grad_var: Any = chainer.Variable.grad_var
    chainer.Parameter.grad_var = property(_grad_var, grad_var.fset, doc=grad_var.__doc__)


def _adopting(name: str) -> Any:
    plain = inspect.unwrap(getattr(chainer.Variable, name))

    @functools.wraps(plain)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_stranger(self):
            return getattr(adopt(self), name)(*args, **kwargs)
        return plain(self, *args, **kwargs)

    return method


def _grad_var(self: Any) -> Any:
    plain: Any = chainer.Variable.grad_var
    return adopt(self).grad_var if _is_stranger(self) else plain.fget(self)


def _is_stranger(parameter: Any) -> bool:
    return backward_state.is_noted() and not isinstance(parameter, ScaledParameter)
