"""Adaptive loss scaling for Chainer."""

from ada_loss.chainer import compat as compat
