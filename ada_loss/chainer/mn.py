"""ChainerMN: ranks see different data and choose different exponents, so these are agreed before gradients are averaged."""

from __future__ import annotations

import math
from typing import Any

import chainermn.communicators as communicators
import numpy as np
from chainermn.optimizers import _DoubleBufferingOptimizer
from mpi4py import MPI

from ada_loss.chainer.gradient import InFlight, shifted
from ada_loss.chainer.optimizer import PreparedOptimizer, prepare_in_place
from ada_loss.chainer.parameters import ScaledParameter, adopt
from ada_loss.statistics import largest_magnitude

_UNBOUNDED = np.iinfo(np.int32).max
"""Stands for "any exponent will do" where a rank has no gradient for a parameter."""


class PreparedMultiNodeOptimizer:
    """What `prepare` adds to ChainerMN's multi-node optimizer: exponents agreed before every averaging."""

    communicator: Any
    actual_optimizer: Any
    zero_fill: bool

    def update(self, lossfun: Any = None, *args: Any, **kwargs: Any) -> None:
        target = self.actual_optimizer.target
        if lossfun is not None:
            loss = lossfun(*args, **kwargs)
            target.cleargrads()
            loss.backward(loss_scale=self.actual_optimizer._loss_scale)
            del loss
        if self.is_changed(target):  # type: ignore[attr-defined]
            # Some parameter exists since the last update only: every rank starts from rank 0's values.
            self.communicator.bcast_data(target)
            return
        parameters = [adopt(parameter) for _, parameter in sorted(target.namedparams()) if parameter.is_initialized]
        exponents = lend_at_agreed_exponents(parameters, self.communicator, sums_in_float16(self.communicator))
        self.communicator.multi_node_mean_grad(target, self.zero_fill)
        for parameter, exponent in zip(parameters, exponents, strict=True):
            parameter.reclaim(exponent)
        self.actual_optimizer.update()


def prepare_multi_node(optimizer: Any) -> Any:
    """Prepare a multi-node optimizer and the optimizer inside it; see `ada_loss.chainer.prepare`."""
    if isinstance(optimizer, _DoubleBufferingOptimizer):
        raise ValueError(
            "Double buffering averages gradients while the next ones are computed, so their exponents cannot be agreed: "
            "create the multi-node optimizer with double_buffering=False."
        )
    prepare_in_place(optimizer.actual_optimizer, PreparedOptimizer)
    prepare_in_place(optimizer, PreparedMultiNodeOptimizer)
    return optimizer


def lend_at_agreed_exponents(parameters: list[ScaledParameter], communicator: Any, headroom: bool) -> list[int]:
    """Bring every parameter's gradient to one exponent on all ranks, and show it to the communicator.

    parameters: in the same order on all ranks. headroom: leave room for the sum over the ranks in the gradient's own
    format. Returns the exponents; `ScaledParameter.reclaim` takes the gradients back with them.
    """
    gradients = [parameter.collapsed() for parameter in parameters]
    size = communicator.size if headroom else 1
    wanted = [_UNBOUNDED if gradient is None else _exponent_for(gradient, size) for gradient in gradients]
    agreed = np.array(wanted, np.int32)
    communicator.mpi_comm.Allreduce(MPI.IN_PLACE, agreed, op=MPI.MIN)
    exponents = [0 if exponent == _UNBOUNDED else exponent for exponent in agreed.tolist()]
    for parameter, gradient, exponent in zip(parameters, gradients, exponents, strict=True):
        # The communicator averages in place, and functions may have handed one array to several parameters.
        parameter.lend(None if gradient is None else shifted(gradient.array, exponent - gradient.exponent).copy())
    return exponents


def sums_in_float16(communicator: Any) -> bool:
    """Whether a communicator adds gradients in their own format; the others average through float32."""
    return not isinstance(communicator, communicators.naive_communicator.NaiveCommunicator)


def _exponent_for(gradient: InFlight, size: int) -> int:
    """The largest exponent at which `size` gradients like this one can be added without overflow."""
    array, exponent = gradient
    if size == 1 or array.dtype != np.float16:
        return exponent
    peak = largest_magnitude(array) * size
    limit = float(np.finfo(array.dtype).max)
    if not math.isfinite(peak) or peak <= limit:
        return exponent
    return exponent - math.frexp(peak / limit)[1]
