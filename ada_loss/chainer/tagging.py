"""Marks the functions that a scaled model applies as its scope's, and decision points as their layer's."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import chainer

from ada_loss.chainer.products import is_decision
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Site

_NAME = "AdaLossRecorder"


class Point(NamedTuple):
    """A decision point. config: settings of its own; None for those of the scope."""

    site: Site
    config: AdaLossConfig | None


class Tag(NamedTuple):
    """What a function in a scope carries.

    point: of a decision point; None for any other function. by_call: whether it is the model's call that has
    applied the function.
    """

    scope: Any
    point: Point | None = None
    by_call: bool = True


def tag_of(function: chainer.FunctionNode) -> Tag | None:
    """The tag of a function that was applied in a scope, None outside of every scope."""
    return getattr(function, "ada_loss_tag", None)


def given_to(function: chainer.FunctionNode) -> tuple[str | None, AdaLossConfig | None]:
    """The name and the settings that a function was applied with outside of every call (`Naming`)."""
    return getattr(function, "ada_loss_given", (None, None))


class Naming(chainer.FunctionHook):
    """Within it functions get a name and settings, for the scope that a backward pass will find them in."""

    def __init__(self, name: str | None, config: AdaLossConfig | None) -> None:
        # Several of them may be inside one another, of which Chainer calls the innermost last.
        self.name = f"AdaLossNaming {id(self)}"
        self._given = name, config

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        (name, config), (around, settings_around) = self._given, given_to(function)
        function.ada_loss_given = name or around, config or settings_around


def communicates(function: chainer.FunctionNode) -> bool:
    """Whether a function hands gradients to other processes on the way back."""
    implementation = function.function if isinstance(function, chainer.function.FunctionAdapter) else function
    return type(implementation).__module__.startswith("chainermn.")


class LinkPaths:
    """Paths of the links below a root, looked up by identity; found anew when an unknown link turns up."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[chainer.Link], str]] = {}

    def find(self, link: chainer.Link, root: chainer.Link) -> str | None:
        """The link's first path below `root`, "/" for `root` itself; None if it is not below."""
        return self._look_up(link) or self._search(link, root)

    def _look_up(self, link: chainer.Link) -> str | None:
        reference, path = self._known.get(id(link), (None, None))
        return path if reference is not None and reference() is link else None

    def _search(self, link: chainer.Link, root: chainer.Link) -> str | None:
        self._known = {id(found): (weakref.ref(found), path) for path, found in named_links(root).items()}
        return self._look_up(link)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is known is known of these very links, and not of their copies.
        return LinkPaths, ()


def named_links(link: chainer.Link) -> dict[str, chainer.Link]:
    """Every link once, by its first path below `link`, "/" for `link` itself."""
    found: dict[int, tuple[str, chainer.Link]] = {}
    for path, child in link.namedlinks():
        found.setdefault(id(child), (path, child))
    return dict(found.values())


class Recorder(chainer.FunctionHook):
    """While entered: tags the functions that are applied in backprop mode.

    scope: what the functions belong to. path_of: the path of a link, None if it has none. next_call: how
    often a path has been asked for before. applied: filled with every function that is tagged and the path of
    its link, if given.
    """

    name = _NAME

    def __init__(
        self,
        scope: Any,
        path_of: Callable[[chainer.Link], str | None],
        next_call: Callable[[str], int],
        applied: list[tuple[Any, str]] | None = None,
    ) -> None:
        self._inside = Tag(scope)
        self._path_of = path_of
        self._next_call = next_call
        self._applied = applied
        self._links = _LinkStack()
        self._pathless: dict[int, chainer.Link] = {}
        self._given: list[tuple[str | None, AdaLossConfig | None]] = []
        self._around: Recorder | None = None

    def __enter__(self) -> Recorder:
        # A backward pass inside a scaled model's forward may recompute what F.forget forgot, in a recorder of
        # its own.
        self._around = chainer.get_function_hooks().pop(_NAME, None)
        if self._around is not None:
            self._around._links.__exit__()
        self._links.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._links.__exit__(*exc)
        self._links.running.clear()
        if self._around is not None:
            self._around._links.__enter__()
            chainer.get_function_hooks()[_NAME] = self._around

    @contextmanager
    def named(self, name: str | None, config: AdaLossConfig | None) -> Iterator[None]:
        """Within it decision points get a name in place of their layer's path, and settings, if not None."""
        self._given.append((name, config))
        try:
            yield
        finally:
            self._given.pop()

    def forward_postprocess(self, function: Any, in_data: Any) -> None:
        if not chainer.config.enable_backprop:
            return
        decides = is_decision(function)
        function.ada_loss_tag = self._inside._replace(point=self._next_point()) if decides else self._inside
        if self._applied is not None:
            self._applied.append((function, self._layer()[0]))

    def _next_point(self) -> Point:
        name, given = self._given[-1] if self._given else (None, None)
        path, own = self._layer()
        path = name or path
        return Point(Site(path, self._next_call(path)), given or own)

    def _layer(self) -> tuple[str, AdaLossConfig | None]:
        """The path of the innermost link that has one, and the settings of its own."""
        self._links.end_those_that_raised()
        for link, _ in reversed(self._links.running):
            path = self._find(link)
            if path is not None:
                return path, getattr(link, "ada_loss_config", None)
        return "/", None

    def _find(self, link: chainer.Link) -> str | None:
        """The link's path; a link without one is looked for only once while this recorder is entered."""
        if id(link) in self._pathless:
            return None
        path = self._path_of(link)
        if path is None:
            self._pathless[id(link)] = link
        return path


def active_recorder() -> Recorder | None:
    """The recorder of the scope that is being computed in this thread."""
    return chainer.get_function_hooks().get(_NAME)


class _LinkStack(chainer.LinkHook):
    """The links whose forward is running, outermost first."""

    name = _NAME

    def __init__(self) -> None:
        self.running: list[tuple[chainer.Link, FrameType]] = []

    def forward_preprocess(self, args: Any) -> None:
        self.running.append((args.link, sys._getframe(1)))

    def forward_postprocess(self, args: Any) -> None:
        # Links inside that raised, to be caught by this one, are still there.
        while self.running and self.running.pop()[0] is not args.link:
            pass

    def end_those_that_raised(self) -> None:
        """Drop the innermost links whose call nobody waits for any more.

        Chainer tells nobody that a link raised. The call of one that did not is below us on Python's own
        stack, and usually a few frames away.
        """
        while self.running:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame is not self.running[-1][1]:
                frame = frame.f_back
            if frame is not None:
                return
            self.running.pop()
