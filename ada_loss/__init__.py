"""Adaptive loss scaling for float16 training: every layer finds its own power-of-two scale.

This package is light to import. The Chainer engine is in `ada_loss.chainer`; the rules that choose the
scales are in `ada_loss.core.rules` and know nothing of Chainer.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
