"""Persistent values of links, such as running statistics: a skipped step puts them back.

A forward pass writes them long before anybody knows whether the step will be skipped. A link that has some is
therefore watched: before each call it notes what they are. Its results remember that note, so a backward pass
that goes through them tells which calls belong to the step. Persistent values are small as a rule, and so is
the cost: one copy of them for each call, or for each step where `update` is given the loss function.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import chainer
import chainer.links as L

from ada_loss.arrays.library import all_finite
from ada_loss.chainer.made_classes import become, made_class, picklable
from ada_loss.chainer.nested import map_variables

_numbers = itertools.count()

_LAZY = {"avg_mean": 0, "avg_var": 1}
"""What running statistics are made of that take their shape from the first batch, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class _Note:
    """What a link's persistent values were at some time.

    Args:
        number: orders notes by time.
        values: by name, the value itself and a copy of it.
        initializers: those of statistics that do not exist yet, by name.
    """

    number: int
    values: dict[str, tuple[Any, Any]]
    initializers: dict[str, Any]

    @classmethod
    def of(cls, link: chainer.Link) -> _Note:
        values: dict[str, Any] = {name: getattr(link, name, None) for name in link._persistent}
        missing = [name for name in _LAZY if isinstance(link, L.BatchNormalization) and values[name] is None]
        return cls(
            next(_numbers),
            {name: (value, value.copy() if _is_array(value) else value) for name, value in values.items()},
            {name: getattr(link, f"_initial_{name}") for name in missing},
        )

    def put_back(self, link: chainer.Link) -> None:
        """Give the link these values again: in place, where it still holds the same array."""
        for name, (value, copied) in self.values.items():
            present = getattr(link, name, None)
            if name in self.initializers and present is not None:
                setattr(link, name, link._init_array(self.initializers[name], _LAZY[name], present.shape))
            elif not _is_array(copied):
                setattr(link, name, copied)
            elif present is value:
                with chainer.using_device(chainer.backend.get_device_from_array(present)):
                    present[...] = copied
            else:
                setattr(link, name, link.device.send(copied))


class _Step(threading.local):
    """What has been noted since the last update of a prepared optimizer.

    first: each link's first note. used: its first note of a call that belongs to the step. begun: whether
    every call belongs to the step. since: the number from which on notes were made after that update.
    """

    begun = False
    since = 0

    def __init__(self) -> None:
        self.first: weakref.WeakKeyDictionary[chainer.Link, _Note] = weakref.WeakKeyDictionary()
        self.used: weakref.WeakKeyDictionary[chainer.Link, _Note] = weakref.WeakKeyDictionary()

    def use(self, link: chainer.Link, note: _Note) -> None:
        known = self.used.get(link)
        if known is None or note.number < known.number:
            self.used[link] = note


_step = _Step()


class Watched:
    """Put in front of a link's class: notes its persistent values before each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note = _noted(self)
        results = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if note is not None:
            _remember(self, note, results)
        return results

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return *picklable(*reduced[:2]), *reduced[2:]


def watch(target: chainer.Link) -> None:
    """Watch every link from `target` downwards that has persistent values."""
    for link in _links_with_values(target):
        if not isinstance(link, Watched):
            plain = type(link)
            watched = made_class(Watched, plain)
            watched.__name__, watched.__qualname__ = plain.__name__, plain.__qualname__
            become(link, watched)


def begin(target: chainer.Link) -> None:
    """Begin a step of which `target` is trained: all calls from now on belong to it."""
    watch(target)
    for link in _links_with_values(target):
        note = _Note.of(link)
        _step.first.setdefault(link, note)
        _step.use(link, note)
    _step.begun = True


def went_through(function: chainer.FunctionNode) -> None:
    """Note that a backward pass has gone through a function, so that the call that applied it belongs to the
    step."""
    for reference, note in getattr(function, "ada_loss_notes", ()):
        link = reference()
        if link is not None:
            _step.use(link, note)


def undo() -> None:
    """Put back what the step has changed, and what is not finite since: a call that no gradient came back
    through may have been given the same bad batch."""
    for link, note in _latest_first(_step.used):
        # A call that an earlier step has used as well, as in a GAN, left what that one was made with.
        if note.number >= _step.since or not _is_finite(link, note):
            note.put_back(link)
    undo_where_not_finite()


def undo_where_not_finite() -> None:
    """Put back values that were finite after the last step and are not now."""
    for link, note in _latest_first(_step.first):
        if not _is_finite(link, note):
            note.put_back(link)


def end() -> None:
    """End the step: what has been noted is of no use any more."""
    _step.begun, _step.since = False, next(_numbers)
    _step.first.clear()
    _step.used.clear()


def _noted(link: Any) -> _Note | None:
    """A note of a link that is about to be called; None where it is not needed."""
    config = chainer.config
    if not link._persistent or config.in_recomputing or not (config.train or config.enable_backprop):
        return None
    belongs = _step.begun or config._will_recompute
    if belongs and link in _step.used:
        return None
    note = _Note.of(link)
    _step.first.setdefault(link, note)
    if belongs:
        # What F.forget forgets is recomputed without the link's being called in this way.
        _step.use(link, note)
    return note


def _remember(link: Any, note: _Note, results: Any) -> None:
    """Let the functions that made a call's results remember the note."""

    def remember(result: chainer.Variable) -> chainer.Variable:
        maker = result.creator_node
        if maker is not None:
            maker.ada_loss_notes = (*getattr(maker, "ada_loss_notes", ()), (weakref.ref(link), note))
        return result

    map_variables(remember, results)


def _latest_first(notes: Mapping[chainer.Link, _Note]) -> list[tuple[chainer.Link, _Note]]:
    """Notes with their links; where links share an array, the earliest note of it is put back last."""
    return sorted(notes.items(), key=lambda item: -item[1].number)


def _links_with_values(target: chainer.Link) -> Iterator[chainer.Link]:
    seen = set()
    for link in target.links():
        if link._persistent and id(link) not in seen:
            seen.add(id(link))
            yield link


def _is_finite(link: chainer.Link, note: _Note) -> bool:
    """Whether all values of a link are finite that there were when the note was made."""
    values: list[Any] = [getattr(link, name, None) for name in note.values]
    return all_finite([value for value in values if _is_array(value) and value.dtype.kind == "f"])


def _is_array(value: Any) -> bool:
    return isinstance(value, chainer.get_array_types())
