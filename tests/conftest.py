"""Chainer needs the compatibility layer before its first import."""

import ada_loss.chainer.compat  # noqa: F401
