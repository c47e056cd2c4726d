"""The door to what differs among NumPy, CuPy and PyTorch: the library is chosen here, by the array, and once.

Whatever an array belongs to, `library_of(array)` answers the same questions of it; the functions below ask
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from ada_loss.core.deferred import Deferred, fetch
from ada_loss.core.measurement import Statistics


class Library(Protocol):
    """What a library of arrays does in a way of its own."""

    @property
    def module(self) -> Any:
        """The module with its functions."""

    @property
    def on_host(self) -> bool:
        """Whether looking at a value costs nothing, as nothing has to be waited for."""

    def cast(self, array: Any, dtype: Any) -> Any:
        """The array in another float type, rounded to nearest; the array itself where it has it already."""

    def summarize(self, array: Any, *, amin: bool = False, logs: bool = False) -> Deferred[Statistics]:
        """Statistics of an array of floats, of any shape, contiguous or not.

        Args:
            array: the array.
            amin: whether to look for the smallest magnitude.
            logs: whether to add up ln|x| and its square.
        """

    def amax(self, array: Any) -> Deferred[float]:
        """max|x|, 0 for an empty array; infinity or NaN where there is one."""

    def product_extremes(self, gy_rows: Any, weight_rows: Any) -> Deferred[tuple[float, float]]:
        """Smallest nonzero and largest |gy * W| over every pair in the same row, (0, 0) where there is none.

        Args:
            gy_rows: a matrix of floats with a row for each channel.
            weight_rows: another. Where one is not finite, the result means nothing.
        """

    def all_finite(self, arrays: Sequence[Any]) -> bool:
        """Whether every element of every array is finite; waits once for all of them."""


_MODULES = {name: f"ada_loss.arrays.on_{name}" for name in ("numpy", "cupy", "torch")}


def library_of(array: Any) -> Library:
    """The library that an array belongs to.

    Raises:
        TypeError: it is of none that is known here.
    """
    cls: Any = type(array)
    return _library_of_class(cls)


@cache
def _library_of_class(cls: type) -> Library:
    # A class of somebody's own is an array of the library that it is derived from.
    for base in cls.__mro__:
        name = base.__module__.partition(".")[0]
        if name in _MODULES:
            return import_module(_MODULES[name]).library()
    raise TypeError(f"ada_loss works on arrays of {', '.join(_MODULES)}, not on {cls.__name__}.")


def cast(array: Any, dtype: Any) -> Any:
    """The array in another float type; see `Library.cast`."""
    return library_of(array).cast(array, dtype)


def summarize(array: Any, *, amin: bool = False, logs: bool = False) -> Deferred[Statistics]:
    """Statistics of an array; see `Library.summarize`."""
    return library_of(array).summarize(array, amin=amin, logs=logs)


def deferred_amax(array: Any) -> Deferred[float]:
    """max|x| of an array; see `Library.amax`."""
    return library_of(array).amax(array)


def amax_of(array: Any) -> float:
    """max|x| of an array; on a device this waits for it."""
    return fetch([library_of(array).amax(array)])[0]


def all_finite(arrays: Sequence[Any]) -> bool:
    """Whether every element of every array is finite; waits once for each library that has some."""
    libraries = dict.fromkeys(map(library_of, arrays))
    # Those on the host come first, since they make nobody wait.
    return all(
        library.all_finite([array for array in arrays if library_of(array) == library])
        for library in sorted(libraries, key=lambda library: not library.on_host)
    )
