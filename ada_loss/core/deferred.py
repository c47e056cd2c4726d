"""Results that may not be there yet, because a device still computes them.

Nobody waits for one before `fetch`, which brings the figures of many over in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """Numbers that lie on a device.

    Attributes:
        vector: an array of float64 without further axes.
        count: how many numbers it holds.
        transfer: brings several such vectors over, one behind the other; waits for the device.
    """

    vector: Any
    count: int
    transfer: Callable[[Sequence[Any]], list[float]]


@dataclass(frozen=True)
class Ready(Generic[T]):
    """A result that is there."""

    value: T

    @property
    def figures(self) -> tuple[Figures, ...]:
        """None: nothing of it is on a device."""
        return ()


@dataclass(frozen=True)
class OnDevice(Generic[T]):
    """A result that `build` makes of figures, once they are here."""

    figures: tuple[Figures, ...]
    build: Callable[[list[float]], T]

    def take(self, numbers: Iterator[float]) -> T:
        """The result, of the first of the numbers that remain."""
        return self.build(list(islice(numbers, sum(each.count for each in self.figures))))


Deferred: TypeAlias = Ready[T] | OnDevice[T]
"""A result of type T: ready where it was computed on the host, on its way on a device."""


def fetch(results: Sequence[Deferred[T]]) -> list[T]:
    """The results, in the same order, with one transfer for all that lie on devices of one library."""
    return _built(results, _transferred([each for result in results for each in result.figures]))


def combine(build: Callable[..., T], *parts: Deferred[Any]) -> Deferred[T]:
    """What `build` makes of several results: at once where all are ready, else when it is fetched."""
    for part in parts:
        if isinstance(part, OnDevice):
            figures = tuple(each for part in parts for each in part.figures)
            return OnDevice(figures, lambda numbers: build(*_built(parts, numbers)))
    return Ready(build(*_built(parts, [])))


def _built(results: Sequence[Deferred[T]], numbers: list[float]) -> list[T]:
    remaining = iter(numbers)
    return [result.value if isinstance(result, Ready) else result.take(remaining) for result in results]


def _transferred(figures: Sequence[Figures]) -> list[float]:
    """All numbers in order; a library transfers its own vectors together."""
    if not figures:
        return []
    libraries = dict.fromkeys(each.transfer for each in figures)
    arrived = {
        transfer: iter(transfer([each.vector for each in figures if each.transfer == transfer]))
        for transfer in libraries
    }
    return [number for each in figures for number in islice(arrived[each.transfer], each.count)]
