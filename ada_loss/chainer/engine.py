"""Puts what scaled models need in place of Chainer's own: the backward engine, `chainer.grad`, and kernels.

The first scaled model does it. Until then Chainer is as it is.
"""

from __future__ import annotations

from ada_loss.chainer import adoption, backward, grad, kernels, soft_float32


def install() -> None:
    """Install engine and kernels; once is enough, and kernels that somebody has chosen stay."""
    # Gradients of scaled models carry exponents; every other graph is left to Chainer's own engine.
    backward.install()
    grad.install()
    soft_float32.install()
    adoption.install()
    # NumPy has no float16 arithmetic worth the name; float32 and float64 keep Chainer's bits.
    kernels.use_by_default("numpy")
