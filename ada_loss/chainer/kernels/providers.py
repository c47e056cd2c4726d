"""The providers by name, each loaded when it is first asked for."""

from __future__ import annotations

import functools
import importlib.util

from ada_loss.chainer.kernels.dispatch import CHAINER, Provider, before

PROVIDERS = ("chainer", "numpy", "torch", "auto")


@functools.cache
def provider(name: str) -> Provider:
    """The provider of this name; `auto` gives the best one installed.

    Raises:
        ValueError: there is no provider of that name.
        ImportError: what it needs is not installed.
    """
    if name == "auto":
        return provider("torch" if importlib.util.find_spec("torch") else "numpy")
    if name == "chainer":
        return CHAINER
    if name == "numpy":
        from ada_loss.chainer.kernels.on_numpy import KERNELS

        return Provider(name, KERNELS)
    if name == "torch":
        if importlib.util.find_spec("torch") is None:
            raise ImportError(
                "The kernels 'torch' need PyTorch: install ada-loss[torch], or use the kernels 'numpy'."
            )
        from ada_loss.chainer.kernels import on_torch

        return Provider(name, before(on_torch.KERNELS, provider("numpy").kernels), on_torch.copy)
    raise ValueError(f"There are no kernels {name!r}: choose one of {', '.join(PROVIDERS)}.")
