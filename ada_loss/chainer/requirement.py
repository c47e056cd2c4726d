"""Says how Chainer is installed, before anything needs it."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("chainer") is None:
    raise ImportError(
        "ada_loss.chainer needs Chainer, which is not installed: python -m ada_loss.install chainer."
    )
