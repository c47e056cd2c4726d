"""Functions of the user's own: their backward sees true gradients, or is known to be linear in scaled ones.

Backward of Chainer's functions is linear in the gradient, so an exponent rides along. That of a function that
somebody else wrote may clip or normalize the gradient, start passes of its own (checkpointing), or write to
`param.grad`. In float32 it is handed the true gradient. In float16, which would lose that, it is handed the
scaled one, and whatever it starts, reads and writes carries the same exponent (`backward_state.carrying`).
That is right where backward is linear. So it is computed once more from a gradient closer to the true one:
where the two results differ by more than their scales, the true gradient is tried, and where float16 cannot
hold that, the function is refused.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeVar

import chainer
import numpy as np

from ada_loss.arrays.library import all_finite, amax_of, cast
from ada_loss.chainer import backward_state
from ada_loss.chainer.gradient import shifted
from ada_loss.chainer.hooks import without_hooks
from ada_loss.chainer.products import backward_arrays
from ada_loss.core.formats import FLOAT16
from ada_loss.core.maths import floor_log2

Class = TypeVar("Class", bound=type)

LIBRARIES = ("chainer", "chainercv", "chainermn", "ada_loss")
"""Packages whose functions are linear in the gradient, every one."""

NOT_LINEAR = (
    "{name}.backward is not linear in its gradient, which float16 holds only scaled here, by 2**{exponent}: "
    "cast to float32 around the function, or mark its class with ada_loss.chainer.linear_backward if it is "
    "linear."
)
NOT_TWICE = (
    "{name}.backward cannot be computed twice, by which it would be seen to be linear in its gradient, which "
    "float16 holds only scaled here: cast to float32 around it, or mark its class with "
    "ada_loss.chainer.linear_backward if it is linear."
)

_METHODS = ("backward", "backward_accumulate", "backward_cpu", "backward_gpu")

_LINEAR = "ada_loss_linear_backward"

_LEVELS = {-12: 2.0**-9, -20: 2.0**-2}
"""Where the true gradient is smaller, backward is computed again from gradients whose largest element has
this log2. With it, the difference between two results that rounding explains, as a share of the largest
element: float16 holds the first gradients well, and the others in 16 steps, which shows a threshold."""

_GRAIN = 3 * 2.0**-24
"""A difference that rounding explains whatever the size: a few of float16's smallest steps."""

_LOST, _HELD = 2.0**-11, 2.0**-12
"""The share of the largest element that true gradients may lose in float16, and how large that of what is
computed from them is at least."""

_RETREAT, _RETREATS = 4, 6
"""By how many powers of two the gradient is lowered when a result overflows, and how often at most."""


def linear_backward(cls: Class) -> Class:
    """Declare a function class to be linear in its gradient: a decorator for a `FunctionNode` or `Function`.

    In float16 its backward is then computed once only, as it has to be where it exchanges data with other
    processes. What it starts and writes still carries the right scale. A subclass that has a backward of its
    own is not declared by this.
    """
    setattr(cls, _LINEAR, True)
    return cls


def is_users(function: chainer.FunctionNode) -> bool:
    """Whether a function's backward was written neither by Chainer nor here."""
    implementation = _implementation(function)
    if any(name in vars(implementation) for name in _METHODS):
        return True
    cls: Any = type(implementation)
    return _writer(cls).__module__.partition(".")[0] not in LIBRARIES


def users_gradients(
    function: chainer.FunctionNode,
    targets: tuple[int, ...],
    gys: tuple[Any, ...],
    exponent: int,
    *,
    headroom: int,
    retreats: bool,
) -> tuple[tuple[Any, ...], int]:
    """The gradients of the inputs `targets` of a user's function, and the exponent that they carry.

    gys: arrays or None, which carry `exponent`. headroom: how many powers of two a gradient that the function
    rounds to float16 keeps to its largest number. retreats: whether what overflows is computed again from
    lower gradients. A RuntimeError that names the function if it is not linear and float16 cannot hold the
    true gradient.
    """
    halves = _half_floats(function, targets, gys)
    if not halves or all(gy is None or not gy.any() for gy in gys):
        with backward_state.carrying(0) as changes:
            gxs = _backward(function, targets, _shifted(gys, -exponent))
        _hand_on_leaves(changes)
        return gxs, 0
    if halves == {"inputs"}:
        gys, exponent = _ready_to_round(gys, exponent, headroom)
    calls = _Calls(function, targets, checked=not _is_declared(function))
    result = calls.at(gys, exponent)
    for _ in range(_RETREATS if retreats and not _is_declared(function) else 0):
        if result.changes.communicates or all_finite(_present(result.gxs)) or not all_finite(_present(gys)):
            break
        gys, exponent = _shifted(gys, -_RETREAT), exponent - _RETREAT
        result = calls.at(gys, exponent)
    if not calls.are_linear(result, gys):
        result = calls.true(result, gys)
    calls.keep(result)
    return result.gxs, result.exponent


class _Result(NamedTuple):
    """What a call of backward gave, at an exponent: gradients, and what it changed, which was undone.

    after: by id, what the parameters held that it changed.
    """

    gxs: tuple[Any, ...]
    exponent: int
    changes: backward_state.Changes
    after: dict[int, Any]

    def contributions(self) -> dict[int, tuple[Any, Any]]:
        """What became of every parameter that was changed, by id: the true gradients before and after."""
        return {
            key: (_true_gradient(parameter, before), _true_gradient(parameter, self.after[key]))
            for key, (parameter, before) in self.changes.parameters.items()
        }


class _Calls:
    """Backward of one function for the inputs `targets`, called as often as need be, each time as if it were
    the first. checked: whether it is to be seen whether it is linear."""

    def __init__(self, function: Any, targets: tuple[int, ...], *, checked: bool) -> None:
        self._function = function
        self._targets = targets
        self._checked = checked and not backward_state.changes().checked
        self._drawn = np.random.get_state()
        self._counted = {policy: policy.counted() for policy in backward_state.entered()}

    def at(self, gys: tuple[Any, ...], exponent: int) -> _Result:
        """Call it with arrays that carry `exponent`; what it changes is undone."""
        given = tuple(None if gy is None else gy.copy() for gy in gys)
        np.random.set_state(self._drawn)
        for policy, counted in self._counted.items():
            policy.count_from(counted)
        with backward_state.carrying(exponent, kept=True, checked=self._checked) as changes:
            gxs = _backward(self._function, self._targets, given)
        after = {key: parameter.exchange(before) for key, (parameter, before) in changes.parameters.items()}
        for reference, before, _ in changes.leaves.values():
            _set_gradient(reference(), before)
        return _Result(gxs, exponent, changes, after)

    def keep(self, result: _Result) -> None:
        """Let the changes of one of the calls stand."""
        for key, (parameter, _) in result.changes.parameters.items():
            parameter.exchange(result.after[key])
        _hand_on_leaves(result.changes)

    def are_linear(self, result: _Result, gys: tuple[Any, ...]) -> bool:
        """Whether calls with gradients closer to the true ones give the same as `result`, that with `gys`.

        What is not to be checked, or cannot be, passes: a result that is not finite makes a skipped step.
        """
        if not self._checked or result.exponent == 0 or result.changes.communicates:
            return True
        if not all_finite(_present(result.gxs)):
            return True
        grain = _GRAIN * math.sqrt(max(gy.size for gy in _present(gys)))
        for shift, noise in _shifts_to_the_true(result, gys).items():
            given = _shifted(gys, shift), result.exponent + shift
            # Function hooks need not hear of it, but may be what has changed gradients inside.
            with without_hooks():
                agree = _agree(result, self._again(*given), noise, grain)
            if not agree and not _agree(result, self._again(*given), noise, grain):
                return False
        return True

    def true(self, result: _Result, gys: tuple[Any, ...]) -> _Result:
        """A call with the true gradients, in place of `result`, that with `gys`; refused if they are lost."""
        true = _shifted(gys, -result.exponent)
        lost = zip(_present(_shifted(true, result.exponent)), _present(gys), strict=True)
        if all(_is_close(again, gy, _LOST) for again, gy in lost):
            found = self._again(true, 0)
            if all(_is_held(gx) for gx in _present(found.gxs)):
                return found
        raise RuntimeError(NOT_LINEAR.format(name=_name(self._function), exponent=result.exponent))

    def _again(self, gys: tuple[Any, ...], exponent: int) -> _Result:
        try:
            with chainer.using_config("in_recomputing", True):
                return self.at(gys, exponent)
        except Exception as error:
            raise RuntimeError(NOT_TWICE.format(name=_name(self._function))) from error


def _backward(function: Any, targets: tuple[int, ...], gys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Backward of a function; what became float32 in it, as gradients of parameters are, is rounded."""
    gxs = zip(targets, backward_arrays(function, targets, gys), strict=True)
    halves = [index for index in targets if function.inputs[index].dtype == np.float16]
    return tuple(
        cast(gx, np.float16) if index in halves and gx is not None and gx.dtype == np.float32 else gx
        for index, gx in gxs
    )


def _shifts_to_the_true(result: _Result, gys: tuple[Any, ...]) -> dict[int, float]:
    """By how many powers of two gradients are multiplied to come closer to the true ones, as close as float16
    lets them, and by some at least; each with the noise that is to be expected then.

    They stay scaled by one power of two, since passes inside would scale true ones as they begin.
    """
    levels = [floor_log2(amax) for amax in (_amax(gys), _amax(result.gxs)) if amax]
    smallest, room = min(levels), floor_log2(FLOAT16.max) - 1 - max(levels)
    if result.exponent < 0:
        up = min(-result.exponent - 1, room)
        return {up if up > 0 else -2: _LEVELS[-12]}
    down = {max(1 - result.exponent, low - smallest): noise for low, noise in reversed(_LEVELS.items())}
    return {shift: noise for shift, noise in down.items() if shift < 0} or {max(room, 1): _LEVELS[-12]}


def _agree(one: _Result, other: _Result, noise: float, grain: float) -> bool:
    """Whether two calls gave the same, but for their exponents and for what rounding explains.

    noise: of a result, as a share of its largest element. grain: of a sum over all gradients, where they
    carry the exponent of `other`.
    """
    for a, b in zip(one.gxs, other.gxs, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and not _is_close(shifted(a, other.exponent - one.exponent, _wide(a)), b, noise):
            return False
    first, second = one.contributions(), other.contributions()
    if first.keys() != second.keys():
        return False
    grain *= 2.0 ** -min(one.exponent, other.exponent)
    return all(_add_the_same(*first[key], second[key][1], 2 * noise, grain) for key in first)


def _add_the_same(before: Any, after: Any, also: Any, noise: float, grain: float) -> bool:
    """Whether two true gradients of a parameter differ from the one before by the same."""
    if after is None or also is None:
        return after is also
    if not all_finite([after, also]):
        return True
    added = amax_of(after - (0 if before is None else before))
    limit = noise * added + grain + 2.0**-20 * amax_of(after)
    return amax_of(after - also) <= limit


def _is_close(a: Any, b: Any, noise: float) -> bool:
    wide = _wide(b)
    grain = _GRAIN if b.dtype == np.float16 else 0
    return amax_of(a.astype(wide) - b.astype(wide)) <= noise * amax_of(b) + grain


def _is_held(gx: Any) -> bool:
    """Whether a true gradient is finite, and not so small that float16 has lost it."""
    amax = amax_of(gx)
    return math.isfinite(amax) and (gx.dtype != np.float16 or amax >= _HELD)


def _ready_to_round(gys: tuple[Any, ...], exponent: int, headroom: int) -> tuple[tuple[Any, ...], int]:
    """Gradients so large that what is computed from them can be rounded to float16."""
    amax = _amax(gys)
    if not math.isfinite(amax):
        return gys, exponent
    shift = floor_log2(FLOAT16.max / amax) - headroom
    return _shifted(gys, shift), exponent + shift


def _half_floats(function: Any, targets: tuple[int, ...], gys: tuple[Any, ...]) -> set[str]:
    """Which of the gradients of outputs and of inputs are float16."""
    found = {"outputs" for gy in gys if gy is not None and gy.dtype == np.float16}
    return found | {"inputs" for index in targets if function.inputs[index].dtype == np.float16}


def _implementation(function: Any) -> Any:
    return function.function if isinstance(function, chainer.function.FunctionAdapter) else function


@functools.cache
def _writer(cls: Any) -> type:
    """The class that a function class has its backward from."""
    return next((base for base in cls.__mro__ if any(name in vars(base) for name in _METHODS)), cls)


def _is_declared(function: Any) -> bool:
    cls: Any = type(_implementation(function))
    lineage = cls.__mro__[: cls.__mro__.index(_writer(cls)) + 1]
    return any(_LINEAR in vars(base) for base in lineage)


def _name(function: Any) -> str:
    return type(_implementation(function)).__name__


def _present(arrays: tuple[Any, ...]) -> list[Any]:
    return [array for array in arrays if array is not None]


def _shifted(arrays: tuple[Any, ...], shift: int) -> tuple[Any, ...]:
    return tuple(None if array is None else shifted(array, shift) for array in arrays)


def _amax(arrays: tuple[Any, ...]) -> float:
    return max(map(amax_of, _present(arrays)), default=0.0)


def _wide(array: Any) -> Any:
    return np.promote_types(array.dtype, np.float32)


def _true_gradient(parameter: Any, held: Any) -> Any:
    """The true gradient of a parameter that holds `held`."""
    now = parameter.exchange(held)
    try:
        return parameter.true_gradient()
    finally:
        parameter.exchange(now)


def _hand_on_leaves(changes: backward_state.Changes) -> None:
    """Give leaves the gradients that passes inside gave them, as the code around sees gradients."""
    around = backward_state.changes()
    for reference, before, array in changes.leaves.values():
        if (leaf := reference()) is not None:
            array = shifted(array, around.exponent - changes.exponent)
            _set_gradient(leaf, array)
            around.give(leaf, before, array)


def _set_gradient(leaf: Any, array: Any) -> None:
    if leaf is not None:
        leaf._set_grad_var_without_check(None if array is None else chainer.Variable(array))
