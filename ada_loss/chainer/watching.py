"""Watching a model in Chainer: what every layer's gradients and results are like on sampled steps.

Plain and scaled models are recorded alike. The gradients of a scaled model are looked at as they are
computed; those of a plain one are computed once more on this package's engine, without scales. Unless the
method is `auto`, they are also computed by `auto`: those stand for float32, as nothing underflows in them.
Such passes go over the same graph and touch no parameter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import chainer
import numpy as np
from chainer.backends import cuda
from chainer.variable import VariableNode

from ada_loss.chainer import backward_state, observing
from ada_loss.chainer.backward import BackwardPass, Inputs
from ada_loss.chainer.gradient import ScaledGradient
from ada_loss.chainer.ownership import upstream
from ada_loss.chainer.policy import ChainerPolicy
from ada_loss.chainer.products import is_decision
from ada_loss.chainer.scope import Scope
from ada_loss.chainer.tagging import LinkPaths, Point, Tag, communicates, named_links, tag_of
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Site
from ada_loss.core.histogram import Histogram
from ada_loss.core.maths import floor_log2
from ada_loss.core.recorder import Recorder
from ada_loss.core.records import (
    ACTIVATION,
    BIAS_GRADIENT,
    INPUT_GRADIENT,
    UNSHIFTED,
    WEIGHT_GRADIENT,
    Place,
    Shift,
)

_BIASES = ("b", "beta", "bias")


class Watch:
    """Tells a recorder what goes on in a model.

    Args:
        model: the model, plain or scaled.
        recorder: whom to tell. It says which steps are sampled.
        wide: whether float32 gradients and results are of interest, and not those of float16.
    """

    def __init__(self, model: chainer.Link, recorder: Recorder, *, wide: bool = False) -> None:
        self.model = model
        self.recorder = recorder
        self._dtype = np.dtype(np.float32 if wide else np.float16)
        self._paths: dict[int, str] = {}
        self._leaves: dict[int, Place] = {}
        self._hooks: list[Any] = []
        self._pass: _PlainPass | None = None
        self._truth: dict[tuple[int, int], _Truth] = {}

    def begin(self) -> None:
        """Watch the step that begins, if it is sampled."""
        if not self.recorder.sampling or self._hooks:
            return
        self._paths = {id(link): path for path, link in named_links(self.model).items()}
        self._leaves = {
            id(parameter): Place(path, _kind(path, parameter)) for path, parameter in self.model.namedparams()
        }
        links = _Links(self)
        self._hooks = [links, _Functions(self, links)]
        for hook in self._hooks:
            hook.__enter__()
        observing.add(self)

    def end(self) -> None:
        """Watch no more."""
        observing.remove(self)
        for hook in reversed(self._hooks):
            hook.__exit__(None, None, None)
        self._hooks = []
        self._truth = {}

    def path_of(self, link: chainer.Link) -> str | None:
        """The path of a link of the model."""
        return self._paths.get(id(link))

    def result(self, path: str, array: Any) -> None:
        """Take note of a layer's result."""
        if array is not None and array.dtype == self._dtype:
            self.recorder.observe(Place(path, ACTIVATION), Histogram.of(cuda.to_cpu(array)))

    def differentiate(self, loss: chainer.Variable) -> None:
        """Look at the gradients of a loss, and give them to nobody."""
        start = [(loss.node, chainer.Variable(loss.xp.ones_like(loss.array)))]
        _PlainPass(partial(self._see, loss_scale=1.0)).over(start, 1.0)

    def before_pass(self, outputs: list[tuple[Any, Any]], loss_scale: float, *, ours: bool) -> None:
        functions = [f for f in upstream(outputs) if getattr(f, "ada_loss_place", None) is not None]
        if not functions or not any(x.dtype == self._dtype for f in functions for x in f.inputs):
            return
        if (
            self._dtype == np.float16
            and not any(_scales(f) for f in functions)
            and not _communicates(functions)
        ):
            self._truth = _true_gradients(outputs, loss_scale)
        if not ours:
            see = partial(self._see, loss_scale=loss_scale)
            _PlainPass(see).over(outputs, loss_scale)

    def look(self, function: Any, exponent: int, found: Iterable[tuple[Any, ScaledGradient]]) -> None:
        self._see(function, exponent, found, loss_scale=backward_state.loss_scale())

    def _see(
        self, function: Any, exponent: int, found: Iterable[tuple[Any, ScaledGradient]], *, loss_scale: float
    ) -> None:
        path = getattr(function, "ada_loss_place", None)
        if path is None or backward_state.changes().kept:
            return
        for number, (node, gx) in enumerate(found):
            place = self._place(path, node)
            if place is None or gx.array.dtype != self._dtype:
                continue
            carried = gx.exponent + floor_log2(loss_scale)
            array = cuda.to_cpu(gx.array)
            truth = self._truth.get((id(function), number))
            self.recorder.observe(
                place,
                _true_histogram(array, gx.exponent, loss_scale),
                exponent=carried,
                shift=_shift(function, exponent, gx.exponent) if place.kind == INPUT_GRADIENT else UNSHIFTED,
                lost=None if truth is None else truth.lost(array),
                reference=None if truth is None else truth.histogram,
            )

    def _place(self, path: str, node: VariableNode) -> Place | None:
        if node.creator_node is not None:
            return Place(path, INPUT_GRADIENT)
        variable = node.get_variable_or_none()
        return self._leaves.get(id(variable)) if isinstance(variable, chainer.Parameter) else None


@dataclass(frozen=True)
class _Truth:
    """What float32 has at a place: which elements are not zero, eight to a byte, and the histogram."""

    nonzero: Any
    histogram: Histogram

    def lost(self, array: Any) -> int:
        """How many elements of an array are zero and should not be."""
        present = np.unpackbits(self.nonzero, count=array.size).astype(bool)
        return int(np.count_nonzero(present & (array.reshape(-1) == 0)))


class _PlainPass(BackwardPass):
    """A pass that shows what comes out of each function, and leaves everything as it is."""

    def __init__(self, show: Callable[[Any, int, Inputs], None]) -> None:
        super().__init__()
        self._shown = show

    def over(self, outputs: list[tuple[Any, Any]], loss_scale: float) -> None:
        """Go over a graph, without the user's function hooks."""
        hooks = chainer.get_function_hooks()
        around = dict(hooks)
        hooks.clear()
        try:
            with backward_state.noted(loss_scale):
                self.run((y, None if gy is None else ScaledGradient(gy.array, 0)) for y, gy in outputs)
        finally:
            hooks.update(around)

    def _show(self, function: Any, gys: tuple[Any, ...], exponent: int, found: Inputs) -> None:
        self._shown(function, exponent, found)

    def _present(self, leaf: VariableNode) -> list[ScaledGradient]:
        return []


def _true_gradients(outputs: list[tuple[Any, Any]], loss_scale: float) -> dict[tuple[int, int], _Truth]:
    """What every function's gradients are where each has a scale of its own, by function and number."""
    truth: dict[tuple[int, int], _Truth] = {}

    def keep(function: Any, exponent: int, found: Inputs) -> None:
        for number, (_, gx) in enumerate(found):
            array = cuda.to_cpu(gx.array)
            if array.dtype == np.float16:
                histogram = _true_histogram(array, gx.exponent, loss_scale)
                truth[id(function), number] = _Truth(np.packbits(array.reshape(-1) != 0), histogram)

    with _scaled(list(upstream(outputs))):
        _PlainPass(keep).over(outputs, loss_scale)
    return truth


@contextmanager
def _scaled(functions: list[Any]) -> Iterator[None]:
    """Within it every function has scales of its own, found by `auto`."""
    scope = Scope(ChainerPolicy(AdaLossConfig()), LinkPaths(), weakref.ref(chainer.Link()), None)
    before = [tag_of(function) for function in functions]
    for number, function in enumerate(functions):
        point = Point(Site("/", number), None) if is_decision(function) else None
        function.ada_loss_tag = Tag(scope, point)
    try:
        yield
    finally:
        for function, tag in zip(functions, before, strict=True):
            function.ada_loss_tag = tag


def _scales(function: Any) -> bool:
    """Whether a function's gradients have scales without bounds, so that hardly any of them underflows."""
    tag = tag_of(function)
    return tag is not None and tag.scope.policy.config.rule.scales_sums


def _communicates(function: Any) -> bool:
    """Whether all processes take part in a function's backward."""
    implementation = getattr(function, "_impl_selector", None)
    return communicates(function) or getattr(implementation, "comm", None) is not None


def _true_histogram(array: Any, exponent: int, loss_scale: float) -> Histogram:
    """Of an array that carries an exponent, and the loss scale besides."""
    power = floor_log2(loss_scale)
    rest = loss_scale / 2.0**power
    wide = array if rest == 1 else array.astype(np.float32) / np.float32(rest)
    return Histogram.of(wide, exponent + power)


def _shift(function: Any, arrived: int, left: int) -> Shift:
    """The shift that was chosen at a function."""
    tag = tag_of(function)
    decision = None
    if tag is not None and tag.point is not None:
        decision = tag.scope.policy.decisions.get(tag.point.site)
    if decision is None:
        return Shift(used=left - arrived)
    wanted, safe = (_whole(end - arrived) for end in (decision.range.wanted, decision.range.safe))
    return Shift(wanted, safe, decision.shift, left - arrived)


def _whole(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def _kind(path: str, parameter: chainer.Parameter) -> str:
    return BIAS_GRADIENT if path.rpartition("/")[2] in _BIASES else WEIGHT_GRADIENT


class _Links(chainer.LinkHook):
    """Knows which links are running, and looks at the results of layers."""

    name = "AdaLossWatchedLinks"

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.running: list[chainer.Link] = []

    @property
    def layer(self) -> str | None:
        """The path of the innermost link, if it holds no other."""
        if not self.running or _has_children(self.running[-1]):
            return None
        return self._watch.path_of(self.running[-1])

    @property
    def path(self) -> str:
        """The path of the innermost link that has one."""
        paths = (self._watch.path_of(link) for link in reversed(self.running))
        return next((path for path in paths if path is not None), "/")

    def forward_preprocess(self, args: Any) -> None:
        if args.link is self._watch.model:
            # Links whose forward has raised in a call before this one were never left.
            self.running.clear()
        self.running.append(args.link)

    def forward_postprocess(self, args: Any) -> None:
        path = self.layer
        while self.running and self.running.pop() is not args.link:
            pass
        if path is not None and isinstance(args.out, chainer.Variable):
            self._watch.result(path, args.out.array)


class _Functions(chainer.FunctionHook):
    """Notes on functions to which place their gradients belong."""

    name = "AdaLossWatchedFunctions"

    def __init__(self, watch: Watch, links: _Links) -> None:
        self._links = links

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        path = self._links.layer
        if path is None and is_decision(function):
            # Functions that a chain applies by itself, such as the cast of its results.
            path = f"{self._links.path.rstrip('/')}/({function.label})"
        function.ada_loss_place = path


def _has_children(link: chainer.Link) -> bool:
    return next(iter(link.children()), None) is not None
