"""Extensions for Chainer's trainer."""

from ada_loss.chainer.extensions.observe_scales import observe_scales

__all__ = ["observe_scales"]
