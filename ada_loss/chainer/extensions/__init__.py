"""Extensions for Chainer's trainer."""

from ada_loss.chainer.extensions.observe_scales import observe_scales
from ada_loss.chainer.extensions.record import Record

__all__ = ["Record", "observe_scales"]
