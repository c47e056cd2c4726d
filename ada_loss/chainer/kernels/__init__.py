"""Fast CPU and GPU kernels for Chainer's own functions, in plain and in scaled links alike.

| provider  | what runs                                                                                     |
| --------- | --------------------------------------------------------------------------------------------- |
| `chainer` | Chainer as it is                                                                              |
| `numpy`   | float16 NumPy arrays through float32 BLAS; wider ones keep the bits that Chainer gives them   |
| `torch`   | PyTorch's convolutions (oneDNN on CPU, cuDNN on GPU), without copies, batch normalization,    |
|           | ReLU, arithmetic and casts between float16 and float32; the rest is `numpy`'s                 |
| `auto`    | `torch` where PyTorch is installed, else `numpy`                                              |

In float16 they all but `chainer` read float16, multiply and add in float32 and round the result once to
float16, which is what tensor cores do.

Under `torch` the CPU's convolutions leave all but large images with the channels last in memory, as Chainer's
own do. Shapes are Chainer's, and most other functions keep the order that they find.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ada_loss.chainer.kernels import dispatch
from ada_loss.chainer.kernels.providers import PROVIDERS, provider

__all__ = ["PROVIDERS", "current", "use", "using"]


def use(name: str) -> None:
    """Use this provider from now on, in every thread of the process.

    Raises:
        ValueError: there is no provider of that name.
        ImportError: what it needs is not installed.
    """
    dispatch.activate(provider(name))


def use_by_default(name: str) -> None:
    """Use this provider from now on, unless another one has been chosen for the process."""
    if not dispatch.is_chosen():
        use(name)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use this provider in a block, in the thread that runs it; raises as `use` does."""
    leave = dispatch.enter(provider(name))
    try:
        yield
    finally:
        leave()


def current() -> str:
    """The name of the provider in use; for `auto`, of the one that it chose."""
    return dispatch.active().name
