"""Adaptive loss scaling for float16 training: every layer finds its own power-of-two scale.

This package is light to import. The Chainer engine is in `ada_loss.chainer`; the rules that choose the
scales are in `ada_loss.core.rules` and know nothing of Chainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ada_loss.core.version import VERSION

if TYPE_CHECKING:
    from ada_loss.checking import Check, Loss

__all__ = ["__version__", "check"]

__version__ = VERSION


def check(model: Any, batch: Any = None, loss: Loss | None = None, *, steps: int = 1) -> Check:
    """Find out what float16 would do to a model's gradients: see `ada_loss.checking.check`."""
    # A front end is imported when a model asks for it.
    from ada_loss import checking

    return checking.check(model, batch, loss, steps=steps)
