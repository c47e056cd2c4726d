"""Records which functions a link applies, and tags the decision points among them with the layer that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chainer

from ada_loss.chainer.decisions import is_decision
from ada_loss.config import AdaLossConfig

_NAME = "AdaLossRecorder"


class Site(NamedTuple):
    """Where a shift is chosen.

    path: the innermost link that applied the function, as a path below the wrapped link, "/" for the link itself, or
        the name given to the function, if it has one. index: which of the path's decision points within one step.
    operand: which input's gradient is scaled; matters for products of two activations.
    """

    path: str
    index: int
    operand: int = 0


class Recorder(chainer.FunctionHook):
    """While entered: collects the functions that are applied and gives decision points their site.

    paths: the wrapped link's descendants by identity. configs: settings of layers that have their own, by path.
    """

    name = _NAME

    def __init__(self, paths: dict[int, str], next_index: Callable[[str], int]) -> None:
        self.functions: list[Any] = []
        self._paths = paths
        self._next_index = next_index
        self._links = _LinkStack()

    def __enter__(self) -> Recorder:
        self._links.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._links.__exit__(*exc)

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        if not chainer.config.enable_backprop:
            return
        self.functions.append(function)
        if is_decision(function):
            link = self._links.innermost
            path = self._paths.get(id(link), "/") if link is not None else "/"
            path = getattr(function, "ada_loss_name", None) or path
            function.ada_loss_site = Site(path, self._next_index(path))


def recording() -> bool:
    """Whether a scope is being recorded in this thread."""
    return _NAME in chainer.get_function_hooks()


class _LinkStack(chainer.LinkHook):
    """The links whose forward is running, outermost first."""

    name = _NAME

    def __init__(self) -> None:
        self._stack: list[chainer.Link] = []

    @property
    def innermost(self) -> chainer.Link | None:
        return self._stack[-1] if self._stack else None

    def forward_preprocess(self, args: Any) -> None:
        self._stack.append(args.link)

    def forward_postprocess(self, args: Any) -> None:
        self._stack.pop()
