"""What processes agree on before ChainerMN adds up their gradients: each chooses exponents of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ada_loss.arrays.library import amax_of, deferred_amax
from ada_loss.chainer.gradient import ScaledGradient, shifted
from ada_loss.chainer.parameters import ScaledParameter
from ada_loss.core import agreement
from ada_loss.core.decision import StepMeasurements
from ada_loss.core.deferred import fetch
from ada_loss.core.formats import FLOAT16


class Agreed(NamedTuple):
    """What ranks have agreed on before they average gradients.

    exponents: of the parameters, for `ScaledParameter.accept_average`. others: the smallest of other numbers.
    finite: whether each parameter's gradient is finite on this rank. overflows: whether one on any is not.
    """

    exponents: list[int]
    others: list[int]
    finite: list[bool]
    overflows: bool


def expose_at_agreed_exponents(
    parameters: list[ScaledParameter], communicator: Any, others: Sequence[int] = ()
) -> Agreed:
    """Show every parameter's gradient to the communicator: true, but for one exponent that all ranks agree
    on.

    It is the largest at which the ranks' gradients can be added in float16, as some communicators do, and
    rounding to float16 costs nothing that the sum would show. A rank without a gradient adds zeros where
    another has one.

    parameters: the same on all ranks, in the same order. others: numbers of which the same reduction finds
    the smallest over the ranks.
    """
    gradients = [parameter.true_gradient() for parameter in parameters]
    present = [gradient for gradient in gradients if gradient is not None]
    amaxes = iter(fetch([deferred_amax(gradient) for gradient in present]))
    limit = FLOAT16.max / communicator.size
    bids = [
        agreement.ABSENT if gradient is None else agreement.bid(next(amaxes), limit) for gradient in gradients
    ]
    smallest = _minimum([*bids, *others], communicator)
    agreed = smallest[: len(bids)]
    exponents = [agreement.exponent_of(exponent) for exponent in agreed]
    for parameter, gradient, exponent, known in zip(parameters, gradients, exponents, agreed, strict=True):
        xp = parameter.device.xp
        if gradient is None and known != agreement.ABSENT:
            gradient = xp.zeros(parameter.shape, np.promote_types(parameter.dtype, np.float32))
        # Communicators send memory as it lies, and some receive it in C's order.
        parameter.expose_for_average(
            None if gradient is None else xp.ascontiguousarray(shifted(gradient, exponent))
        )
    finite = [bid != agreement.OVERFLOW for bid in bids]
    return Agreed(exponents, smallest[len(bids) :], finite, agreement.OVERFLOW in agreed)


def agreed_by_all(mine: StepMeasurements, *, communicator: Any) -> StepMeasurements:
    """What all ranks have measured, each site's taken together; with it they choose the same shifts."""
    return communicator.mpi_comm.allreduce(mine, op=StepMeasurements.merged)


def at_agreed_exponent(gradient: ScaledGradient, communicator: Any) -> ScaledGradient:
    """A gradient that all ranks hold a part of, at one exponent: the largest of theirs at which none
    overflows."""
    array, exponent = gradient
    limit = float(np.finfo(array.dtype).max)
    bids = agreement.scaled_bids(amax_of(array), limit, exponent)
    agreed = agreement.scaled_exponent(*_minimum(bids, communicator))
    return ScaledGradient(shifted(array, agreed - exponent), agreed)


def _minimum(values: Sequence[int], communicator: Any) -> list[int]:
    """The smallest value over the ranks, at each place of a list."""
    # Whoever has a communicator has MPI; nobody else needs it.
    from mpi4py import MPI

    smallest = np.array(values, np.int32)
    communicator.mpi_comm.Allreduce(MPI.IN_PLACE, smallest, op=MPI.MIN)
    return smallest.tolist()
