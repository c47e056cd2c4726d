"""How kernels get into Chainer: one table per provider, one hook per method of Chainer's.

A hooked method asks the provider in use for a kernel of that name and runs Chainer's own code where there
is none. So choosing a provider touches no class, providers can differ between threads, and what Chainer
does for arrays that a kernel does not take (other types, other devices) is never copied here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ada_loss.arrays import casting

Kernel = Callable[..., Any]
"""Called as kernel(self, *args) in a method's place; returns None to leave the call to Chainer."""

Hook = tuple[type, str]
"""A class of Chainer's and the name of the method that a kernel stands in for."""


@dataclass(frozen=True)
class Provider:
    """A name and the kernels that it puts in the place of Chainer's methods.

    copy: what casts NumPy arrays between float16 and float32, unless it is `ada_loss.arrays.casting` itself.
    """

    name: str
    kernels: Mapping[Hook, Kernel] = field(default_factory=dict, repr=False)
    copy: casting.Copy | None = None


def before(preferred: Mapping[Hook, Kernel], fallback: Mapping[Hook, Kernel]) -> dict[Hook, Kernel]:
    """Both tables in one: what a preferred kernel leaves goes to the fallback's."""

    def both(first: Kernel, second: Kernel) -> Kernel:
        def kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = first(self, *args, **kwargs)
            return second(self, *args, **kwargs) if result is None else result

        return kernel

    shared = {hook: both(preferred[hook], fallback[hook]) for hook in preferred.keys() & fallback.keys()}
    return {**fallback, **preferred, **shared}


CHAINER = Provider("chainer")
"""No kernels: Chainer as it is."""

_for_process: Provider | None = None
_for_block: ContextVar[Provider | None] = ContextVar("ada_loss.kernels", default=None)
_hooked: set[Hook] = set()


def active() -> Provider:
    """The provider in use here: that of the innermost block in this thread, else the process's."""
    return _for_block.get() or _for_process or CHAINER


def is_chosen() -> bool:
    """Whether a provider has been chosen for the process."""
    return _for_process is not None


casting.prefer(lambda: active().copy)


def activate(provider: Provider) -> None:
    """Make `provider` the one of the process."""
    global _for_process
    install(provider.kernels)
    _for_process = provider


def enter(provider: Provider) -> Callable[[], None]:
    """Make `provider` the one in use in this thread; the function returned undoes that."""
    install(provider.kernels)
    token = _for_block.set(provider)
    return lambda: _for_block.reset(token)


def install(hooks: Iterable[Hook]) -> None:
    """Hook these methods, each once."""
    for hook in hooks:
        if hook not in _hooked:
            _hooked.add(hook)
            _hook(*hook)


def _hook(owner: type, name: str) -> None:
    original = getattr(owner, name)
    hook = owner, name

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = active().kernels.get(hook)
        if kernel is not None:
            # Infinities and NaN are the caller's to look for, as on a GPU.
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                result = kernel(self, *args, **kwargs)
            if result is not None:
                return result
        return original(self, *args, **kwargs)

    setattr(owner, name, method)
