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
from typing import Any, NamedTuple

import chainer

from ada_loss.arrays.library import all_finite, amax_of, library_of
from ada_loss.chainer import backward_state
from ada_loss.chainer.forward_values import What, first_not_finite, is_finite, results_of, value_of
from ada_loss.chainer.gradient import InFlight
from ada_loss.chainer.tagging import tag_of

_RECENT_LOSSES = 16
"""How many backward passes of a step are remembered, for a GPU."""


@dataclass(frozen=True, order=True)
class Skip:
    """Why a step was skipped.

    Args:
        order: the smaller, the earlier in the computation; places on the forward pass come first.
        reason: what was not finite and where that began, as the rest of a sentence.
        path: of the layer there, or of a parameter; in brackets the function, where no layer is known.
    """

    order: tuple[int, int]
    reason: str
    path: str = ""

    @property
    def forward(self) -> bool:
        """Whether it began on the forward pass."""
        return self.order[0] == 0


class _Place(NamedTuple):
    """A function, for people.

    label: Chainer's name of it. path: of the site at which it is a decision point, if it is one. parameter:
    refers to one that it was applied to, if there is one. after: the nearest layer upstream of a function
    that is neither.
    """

    label: str
    path: str | None = None
    parameter: weakref.ref[Any] | None = None
    after: _Place | None = None

    @classmethod
    def of(cls, function: Any) -> _Place:
        upstream = function
        while upstream is not None:
            found = cls._layer(upstream)
            if found is not None:
                return found if upstream is function else cls(function.label, after=found)
            makers = (x.creator_node for x in upstream.inputs or ())
            upstream = next((maker for maker in makers if maker is not None), None)
        return cls(function.label)

    @classmethod
    def _layer(cls, function: Any) -> _Place | None:
        tag = tag_of(function)
        path = tag.point.site.path if tag is not None and tag.point is not None else None
        used = (x.get_variable_or_none() for x in function.inputs or ())
        parameter = next((weakref.ref(x) for x in used if isinstance(x, chainer.Parameter)), None)
        return None if path is None and parameter is None else cls(function.label, path, parameter)

    def text(self, paths: Mapping[int, str]) -> str:
        """What to call it, given the paths of parameters by id."""
        layer = self._path(paths)
        if layer is not None:
            return f"{layer} ({self.label})"
        return self.label if self.after is None else f"{self.label} after {self.after.text(paths)}"

    def layer(self, paths: Mapping[int, str]) -> str:
        """The path of its layer, or of the nearest one upstream; if there is none, Chainer's name of it."""
        own = self._path(paths)
        return own or (f"({self.label})" if self.after is None else self.after.layer(paths))

    def _path(self, paths: Mapping[int, str]) -> str | None:
        # In parentheses are names of ours, such as that of the model's results.
        given_name = self.path is not None and not self.path.startswith(("/", "("))
        parameter = None if self.parameter is None or given_name else self.parameter()
        path = None if parameter is None else paths.get(id(parameter))
        return self.path if path is None else path.rpartition("/")[0] or "/"


class _Origin(NamedTuple):
    """Where it began. order: see `Skip`. words: what to say, with room for the place."""

    order: tuple[int, int]
    words: str
    place: _Place

    def skip(self, paths: Mapping[int, str]) -> Skip:
        return Skip(self.order, self.words.format(place=self.place.text(paths)), self.place.layer(paths))


_BACKWARD_WORDS = "a gradient stopped being finite on the backward pass, "


class _Leaf(NamedTuple):
    """A parameter that gradients have reached, and where it begins if the first of them is not finite."""

    parameter: weakref.ref[Any]
    origin: _Origin


class _Seen(threading.local):
    """What backward passes have shown since the last update of a prepared optimizer.

    origin: where numbers first were not finite. outputs: nodes from which the pass started that is running.
    losses: values of such nodes, of earlier passes as well. number: of the function whose backward is looked
    at, in order. leaves: by id of the parameter.
    """

    origin: _Origin | None = None
    outputs: tuple[Any, ...] = ()
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
    _seen.losses.extend((value, weakref.ref(node)) for node, value in _losses(_seen.outputs))
    try:
        yield
    finally:
        _seen.outputs = around


def look(function: Any, gys: Iterable[Any], found: Iterable[tuple[Any, InFlight]]) -> None:
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
    for node, gradient in found:
        leaf = node.get_variable_or_none() if node.creator_node is None else None
        if isinstance(leaf, chainer.Parameter):
            # The end of the step will tell whether this one is finite.
            if id(leaf) not in _seen.leaves:
                where = "at {place}" if library_of(gradient.array).on_host else "at {place} or before it"
                _seen.leaves[id(leaf)] = _Leaf(weakref.ref(leaf), _of_the_backward_pass(where, function))
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
    first_seen = _seen.origin or _of_remembered_losses()
    candidates = [] if first_seen is None else [first_seen]
    for parameter in bad:
        leaf = _seen.leaves.get(id(parameter))
        if leaf is not None and leaf.parameter() is parameter:
            candidates.append(leaf.origin)
    if candidates:
        return min(candidates, key=lambda origin: origin.order).skip(paths)
    path = min(paths[id(parameter)] for parameter in bad)
    return Skip((1, _seen.number), f"the gradient of {path} is not finite", path)


def end() -> None:
    """Forget what has been seen: a step is over."""
    _seen.origin, _seen.number, _seen.outputs = None, 0, ()
    _seen.leaves.clear()
    _seen.losses.clear()


def _diagnosis(function: Any, gys: list[Any]) -> _Origin:
    """Where it began, of what came out of a function that was the first from which it was not finite."""
    for node, value in _losses(_seen.outputs):
        if not is_finite(value):
            return _of_a_loss(node, value)
    around = [
        *function.inputs,
        *(node for reference in function.outputs if (node := reference()) is not None),
    ]
    if not all(map(is_finite, [*map(value_of, around), *results_of(function)])):
        return _of_the_forward_pass(around)
    if all_finite(gys):
        return _of_the_backward_pass("at {place}", function)
    if any(node.creator_node is function for node in _seen.outputs):
        return _of_the_backward_pass("as it began, at {place}", function)
    return _of_the_backward_pass(
        "where gradients enter a scaled model or add up, at the result of {place}", function
    )


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
    so = f"the loss is {value.item()}, which no scale can help: "
    return _of_the_forward_pass([] if node is None else [node], so)


def _of_the_forward_pass(nodes: Iterable[Any], so: str = "") -> _Origin:
    blame = first_not_finite(nodes)
    if blame is None:
        return _Origin((0, 0), f"{so}numbers stopped being finite on the forward pass", _Place(""))
    return _Origin((0, blame.function.rank), so + _FORWARD_WORDS[blame.what], _Place.of(blame.function))


_FORWARD_WORDS = {
    What.RESULT: "numbers stopped being finite on the forward pass, at {place}",
    What.INPUT: "numbers were not finite on the forward pass, at {place}: those that went in",
    What.PARAMETER: "numbers were not finite on the forward pass, at {place}: those of a parameter",
}


def _of_the_backward_pass(where: str, function: Any) -> _Origin:
    return _Origin((1, _seen.number), _BACKWARD_WORDS + where, _Place.of(function))
