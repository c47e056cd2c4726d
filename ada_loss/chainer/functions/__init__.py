"""Functions for models that are written with scaling in mind."""

from ada_loss.chainer.functions.branch import branch

__all__ = ["branch"]
