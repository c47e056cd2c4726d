"""Extensions for Chainer's trainer."""

from ada_loss.chainer.extensions.leave_out_skipped import leave_out_skipped
from ada_loss.chainer.extensions.observe_scales import observe_scales
from ada_loss.chainer.extensions.record import Record

__all__ = ["Record", "leave_out_skipped", "observe_scales"]
