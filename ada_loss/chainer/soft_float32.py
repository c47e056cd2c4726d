"""float32 that gives way to float16: what float16 results of scaled models come out as.

The script computes on with it in float32, as in a loss. Where it meets float16 it is what it was in the
model, as in a script without scaled models; Chainer itself mixes no formats.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import chainer
import numpy as np

_chainers_apply = inspect.unwrap(chainer.FunctionNode.apply)


def soft(result: chainer.Variable, dtype: Any) -> chainer.Variable:
    """A float16 variable as a wider one that gives way to float16."""
    wide = chainer.functions.cast(result, dtype)
    wide.ada_loss_before = result.dtype
    return wide


def hardened(value: Any) -> Any:
    """A soft variable as float16 again; anything else as it is."""
    before = getattr(value, "ada_loss_before", None)
    return value if before is None else chainer.functions.cast(value, before)


@functools.wraps(_chainers_apply)
def _apply(self: Any, inputs: Any) -> Any:
    if not any(hasattr(x, "ada_loss_before") for x in inputs):
        return _chainers_apply(self, inputs)
    if any(getattr(x, "dtype", None) == np.float16 for x in inputs):
        return _chainers_apply(self, tuple(map(hardened, inputs)))
    before = next(x.ada_loss_before for x in inputs if hasattr(x, "ada_loss_before"))
    outputs = _chainers_apply(self, inputs)
    if all(hasattr(x, "ada_loss_before") or x.dtype.kind != "f" for x in inputs):
        for y in outputs:
            if y.dtype.kind == "f" and y.dtype != before:
                y.ada_loss_before = before
    return outputs


def install() -> None:
    """Make Chainer's functions take soft variables."""
    chainer.FunctionNode.apply = _apply
