"""Where the numbers of a step stopped being finite: what the message about a skipped step says.

On the CPU the engine looks at every gradient as it comes out of a function, while it is in the cache, until
one is not finite; the graph tells the rest. On a GPU looking would mean waiting, so nothing is looked at
before the step is skipped: then the loss tells whether the forward pass is to blame, and the parameters, in
the order in which backward reached them, roughly where on the way back it began.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chainer
from chainer.functions.activation.relu import ReLU
from chainer.functions.array.concat import Concat
from chainer.functions.array.expand_dims import ExpandDims
from chainer.functions.array.reshape import Reshape
from chainer.functions.array.rollaxis import Rollaxis
from chainer.functions.array.split_axis import SplitAxis
from chainer.functions.array.squeeze import Squeeze
from chainer.functions.array.transpose import Transpose

from ada_loss.arrays.library import all_finite, amax_of, library_of
from ada_loss.chainer import backward_state
from ada_loss.chainer.forward_values import What, first_not_finite, is_finite, results_of, value_of
from ada_loss.chainer.gradient import ScaledGradient
from ada_loss.chainer.scope import ENTRY
from ada_loss.chainer.tagging import tag_of

_COPYING = frozenset({Concat, ExpandDims, ReLU, Reshape, Rollaxis, SplitAxis, Squeeze, Transpose})
"""Functions whose gradients have no elements but those of their output gradients, and zeros."""

_RECENT_LOSSES = 16
"""How many backward passes of a step are remembered, for a GPU."""


@dataclass(frozen=True, order=True)
class Skip:
    """Why a step was skipped.

    Args:
        order: the smaller, the earlier in the computation; places on the forward pass come first.
        reason: what was not finite and where that began, as the rest of a sentence.
        path: of the layer there, or of a parameter; in brackets the function, where no layer is known.
        scale_helps: whether gradients may be finite at a smaller scale.
    """

    order: tuple[int, int]
    reason: str
    path: str = ""
    scale_helps: bool = True

    @property
    def forward(self) -> bool:
        """Whether it began on the forward pass."""
        return self.order[0] == 0


class _Place(NamedTuple):
    """A function, for people.

    label: Chainer's name of it. path: of the site at which it is a decision point, if it is one. parameter:
    refers to one that it was applied to, if there is one. near: of a function that has neither, the nearest
    layer upstream, or else one that uses its result; direction: which of the two.
    """

    label: str
    path: str | None = None
    parameter: weakref.ref[Any] | None = None
    near: _Place | None = None
    direction: str = "after"

    @classmethod
    def of(cls, function: Any, users: Iterable[Any] = ()) -> _Place:
        """users: functions of its results."""
        upstream = function
        while upstream is not None:
            found = cls._layer(upstream)
            if found is not None:
                return found if upstream is function else cls(function.label, near=found)
            makers = (x.creator_node for x in upstream.inputs or ())
            upstream = next((maker for maker in makers if maker is not None), None)
        used_by = next((found for user in users if (found := cls._layer(user)) is not None), None)
        return cls(function.label, near=used_by, direction="before")

    @classmethod
    def _layer(cls, function: Any) -> _Place | None:
        tag = tag_of(function)
        path = tag.point.site.path if tag is not None and tag.point is not None else ENTRY
        used = (x.get_variable_or_none() for x in function.inputs or ())
        parameter = next((weakref.ref(x) for x in used if isinstance(x, chainer.Parameter)), None)
        if path == ENTRY:
            # The cast of a model's results is no layer of anybody's.
            return None if parameter is None else cls(function.label, None, parameter)
        return cls(function.label, path, parameter)

    def text(self, paths: Mapping[int, str]) -> str:
        """What to call it, given the paths of parameters by id."""
        layer = self._path(paths)
        if layer is not None:
            return f"{layer} ({self.label})"
        if self.near is None:
            return self.label
        return f"{self.label} {self.direction} {self.near.text(paths)}"

    def layer(self, paths: Mapping[int, str]) -> str:
        """The path of its layer, or of the nearest one; if there is none, Chainer's name of it."""
        own = self._path(paths)
        return own or (f"({self.label})" if self.near is None else self.near.layer(paths))

    def _path(self, paths: Mapping[int, str]) -> str | None:
        # In parentheses are names of ours, such as that of the model's results.
        given_name = self.path is not None and not self.path.startswith(("/", "("))
        parameter = None if self.parameter is None or given_name else self.parameter()
        path = None if parameter is None else paths.get(id(parameter))
        return self.path if path is None else path.rpartition("/")[0] or "/"


class _Origin(NamedTuple):
    """Where it began. order, scale_helps: see `Skip`. words: what to say, with room for the place."""

    order: tuple[int, int]
    words: str
    place: _Place
    scale_helps: bool = True

    def skip(self, paths: Mapping[int, str]) -> Skip:
        words = self.words.format(place=self.place.text(paths))
        return Skip(self.order, words, self.place.layer(paths), self.scale_helps)


_GRAPH_IS_GONE = ", or on the forward pass, whose graph is gone"
_BACKWARD_WORDS = "a gradient stopped being finite on the backward pass, "


class _Leaf(NamedTuple):
    """A parameter that a gradient has reached. number: of the latest pass in which one has. origin: where it
    began if that gradient is not finite. function: refers to the first that it came from in that pass."""

    number: int
    parameter: weakref.ref[Any]
    origin: _Origin
    function: weakref.ref[Any]

    def diagnosis(self) -> _Origin:
        """Where it began, if the graph is still there to tell whether that was on the forward pass."""
        function = self.function()
        if function is None:
            return self.origin._replace(words=self.origin.words + _GRAPH_IS_GONE)
        return _before(function) or self.origin


class _Seen(threading.local):
    """What backward passes have shown since the last update of a prepared optimizer.

    origin: where numbers first were not finite. outputs: nodes from which the pass started that is running.
    losses: values of such nodes, of earlier passes as well. first_pass: the number of the first. number: of
    the function whose backward is looked at, in order. leaves: by id of the parameter.
    """

    origin: _Origin | None = None
    outputs: tuple[Any, ...] = ()
    first_pass: int | None = None
    number = 0

    def __init__(self) -> None:
        self.leaves: dict[int, _Leaf] = {}
        self.losses: deque[tuple[Any, weakref.ref[Any]]] = deque(maxlen=_RECENT_LOSSES)


_seen = _Seen()


@contextmanager
def backward_from(outputs: Iterable[Any]) -> Iterator[None]:
    """Within it a backward pass from these variable nodes runs."""
    around = _seen.outputs
    # A pass inside another one is a part of it.
    _seen.outputs = around or tuple(outputs)
    if _seen.first_pass is None:
        _seen.first_pass = backward_state.number()
    for node, value in _losses(_seen.outputs):
        _seen.losses.append((value, weakref.ref(node)))
        if _seen.origin is None and library_of(value).on_host and not is_finite(value):
            _seen.origin = _of_a_loss(node, value)
    try:
        yield
    finally:
        _seen.outputs = around


def look(function: Any, gys: Iterable[Any], found: Iterable[tuple[Any, ScaledGradient]]) -> None:
    """Look at what came out of the backward of a function.

    Args:
        function: the function.
        gys: gradients of its outputs, arrays or None.
        found: nodes of its inputs, with their gradients.
    """
    if _seen.origin is not None or backward_state.changes().kept:
        # What runs inside a function of the user's own may run several times, and not every time counts.
        return
    _seen.number += 1
    known = {id(gy) for gy in gys}
    for node, gradient in found:
        leaf = node.get_variable_or_none() if node.creator_node is None else None
        if isinstance(leaf, chainer.Parameter):
            # The end of the step will tell whether this one is finite.
            before = _seen.leaves.get(id(leaf))
            if before is None or before.number != backward_state.number():
                where = "at {place}" if library_of(gradient.array).on_host else "at {place} or before it"
                origin = _of_the_backward_pass(where, function)
                reference = weakref.ref(leaf, partial(_forget, id(leaf)))
                _seen.leaves[id(leaf)] = _Leaf(
                    backward_state.number(), reference, origin, weakref.ref(function)
                )
        elif type(function) in _COPYING or id(gradient.array) in known:
            continue
        elif library_of(gradient.array).on_host and not math.isfinite(amax_of(gradient.array)):
            _seen.origin = _diagnosis(function, [gy for gy in gys if gy is not None])
            return


def reason(target: chainer.Link, bad: Iterable[Any]) -> Skip:
    """Why the step has to be skipped.

    Args:
        target: the optimizer's model.
        bad: those of its parameters whose gradient is not finite, at least one.
    """
    paths = {id(parameter): path for path, parameter in target.namedparams()}
    leaves = [leaf for p in bad if (leaf := _seen.leaves.get(id(p))) and leaf.parameter() is p]
    origin = _seen.origin or _of_remembered_losses()
    if _seen.origin is not None and _seen.first_pass != backward_state.number():
        # In which of the passes a parameter's gradient overflowed is not known.
        leaves = []
    leaf = min(leaves, key=lambda leaf: leaf.origin.order, default=None)
    if leaf is not None and (origin is None or leaf.origin.order < origin.order):
        origin = leaf.diagnosis()
    if origin is not None:
        return origin.skip(paths)
    path = min(paths[id(parameter)] for parameter in bad)
    return Skip((1, _seen.number), f"the gradient of {path} is not finite", path)


def end() -> None:
    """Forget what has been seen: a step is over."""
    _seen.origin, _seen.number, _seen.outputs, _seen.first_pass = None, 0, (), None
    _seen.leaves.clear()
    _seen.losses.clear()


def _forget(key: int, _: Any) -> None:
    _seen.leaves.pop(key, None)


def _diagnosis(function: Any, gys: list[Any]) -> _Origin:
    """Where it began, of what came out of a function that was the first from which it was not finite."""
    if (origin := _before(function)) is not None:
        return origin
    if all_finite(gys):
        return _of_the_backward_pass("at {place}", function)
    if any(node.creator_node is function for node in _seen.outputs):
        return _of_the_backward_pass("as it began, at {place}", function)
    return _of_the_backward_pass(
        "where gradients enter a scaled model or add up, at the result of {place}", function
    )


def _before(function: Any) -> _Origin | None:
    """Where on the forward pass it began, if what a function has computed, or from what, is not finite."""
    results = [node for reference in function.outputs if (node := reference()) is not None]
    around = [*function.inputs, *results]
    if all(map(is_finite, [*map(value_of, around), *results_of(function)])):
        return None
    return _of_the_forward_pass(around)


def _of_remembered_losses() -> _Origin | None:
    """Where a loss stopped being finite, for passes whose gradients nobody has looked at."""
    for value, reference in _seen.losses:
        if not is_finite(value):
            return _of_a_loss(reference(), value)
    return None


def _losses(nodes: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Those nodes that are losses, with their values."""
    values = [(node, value_of(node)) for node in nodes]
    return [(node, value) for node, value in values if value is not None and value.size == 1]


def _of_a_loss(node: Any, value: Any) -> _Origin:
    # A square that float16 cannot hold makes a loss infinite, and its gradient may be finite all the same.
    helps = not math.isnan(value.item())
    so = f"the loss is {value.item()}" + (": " if helps else ", which no scale can help: ")
    return _of_the_forward_pass([] if node is None else [node], so)._replace(scale_helps=helps)


def _of_the_forward_pass(nodes: Iterable[Any], so: str = "") -> _Origin:
    blame = first_not_finite(nodes)
    if blame is None:
        words, place, rank = f"{so}numbers stopped being finite on the forward pass", _Place(""), 0
    else:
        words, place = so + _FORWARD_WORDS[blame.what], _Place.of(blame.function, blame.users)
        rank = blame.function.rank
    return _Origin((0, rank), words, place, scale_helps=False)


_FORWARD_WORDS = {
    What.RESULT: "numbers stopped being finite on the forward pass, at {place}",
    What.RESULT_OR_INPUT: (
        "numbers stopped being finite on the forward pass, at {place}, if those that went in were"
    ),
    What.INPUT: "numbers were not finite on the forward pass, at {place}: those that went in",
    What.PARAMETER: "numbers were not finite on the forward pass, at {place}: those of a parameter",
}


def _of_the_backward_pass(where: str, function: Any) -> _Origin:
    return _Origin((1, _seen.number), _BACKWARD_WORDS + where, _Place.of(function))
