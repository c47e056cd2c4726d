"""ChainerMN's multi-node optimizer, prepared: ranks average true gradients, and skip the same steps."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import partial
from typing import Any

import chainer
import numpy as np
from chainermn.optimizers import _DoubleBufferingOptimizer

from ada_loss.chainer import origin, running_statistics
from ada_loss.chainer.agreement import agreed_by_all, expose_at_agreed_exponents
from ada_loss.chainer.optimizer import (
    compute_gradients,
    prepare_in_place,
    prepare_step,
    scopes,
    unique_parameters,
)
from ada_loss.chainer.origin import Skip
from ada_loss.chainer.parameters import ScaledParameter
from ada_loss.chainer.snapshot import load_optional


class PreparedMultiNodeOptimizer:
    """What `prepare` adds to ChainerMN's multi-node optimizer.

    The ranks' true gradients are averaged in float32, at an exponent at which a communicator may as well add
    them in float16. The first update, and those after which parameters have come to exist, only spread rank
    0's values: of parameters, masters and scales. A training that was resumed on every rank does not need
    that.
    """

    communicator: Any
    actual_optimizer: Any
    target_params: list[Any]
    zero_fill: bool
    _resumed = False

    def setup(self, link: chainer.Link) -> Any:
        self._set(target_params=[], _resumed=False)
        return super().setup(link)  # type: ignore[misc]

    def update(self, lossfun: Any = None, *args: Any, **kwargs: Any) -> None:
        try:
            self._step(lossfun, args, kwargs)
        finally:
            running_statistics.end()
            origin.end()

    def _step(self, lossfun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = self.actual_optimizer.target
        loss = None if lossfun is None else compute_gradients(self.actual_optimizer, lossfun, args, kwargs)
        if self.is_changed(target):
            self._start_from_rank_0(target)
            running_statistics.undo_where_not_finite()
            return
        parameters = [parameter for parameter in unique_parameters(target) if parameter.is_initialized]
        policies = [scope.policy for scope in scopes(target)]
        nothing_begun = [int(not policy.has_measurements) for policy in policies]
        agreed = expose_at_agreed_exponents(parameters, self.communicator, nothing_begun)
        if agreed.overflows:
            bad = [
                parameter for parameter, finite in zip(parameters, agreed.finite, strict=True) if not finite
            ]
            self.actual_optimizer.foreseen_skip = self._where_it_began(bad)
        # Until now its graph could tell where numbers stopped being finite.
        del loss
        try:
            self.communicator.multi_node_mean_grad(target, self.zero_fill)
        finally:
            for parameter, exponent in zip(parameters, agreed.exponents, strict=True):
                parameter.accept_average(exponent)
        for policy, nothing in zip(policies, agreed.others, strict=True):
            # What one rank has begun to measure, perhaps of a layer with a timing of its own, concerns all.
            if not nothing:
                policy.use_measurements(partial(agreed_by_all, communicator=self.communicator))
        self.actual_optimizer.update()

    def is_changed(self, target: chainer.Link) -> bool:
        """Whether ranks may hold different values, as when parameters have just been initialized."""
        first = not self.target_params
        changed = super().is_changed(target)  # type: ignore[misc]
        if first:
            return not self.communicator.mpi_comm.allreduce(self._resumed, op=operator.and_)
        return changed

    def serialize(self, serializer: Any) -> None:
        self.actual_optimizer.serialize(serializer)
        own = serializer["ada_loss"]
        if isinstance(serializer, chainer.Serializer):
            own("ranks_agree", np.array(bool(self.target_params)))
        else:
            self._set(_resumed=bool(load_optional(own, "ranks_agree")), target_params=[])

    def _where_it_began(self, bad: list[ScaledParameter]) -> Skip:
        """Where it began that this step will be skipped: on one rank, and from there on all.

        bad: parameters whose gradient is not finite on this rank.
        """
        mine = origin.reason(self.actual_optimizer.target, bad) if bad else None
        everybodys = enumerate(self.communicator.mpi_comm.allgather(mine))
        began, rank = min((skip, rank) for rank, skip in everybodys if skip is not None)
        return replace(began, reason=f"on rank {rank} {began.reason}")

    def _start_from_rank_0(self, target: chainer.Link) -> None:
        self.communicator.bcast_data(target)
        parameters, policies = unique_parameters(target), [scope.policy for scope in scopes(target)]
        mine = None
        if self.communicator.rank == 0:
            masters = [
                None if p.master is None else chainer.backends.cuda.to_cpu(p.master) for p in parameters
            ]
            mine = masters, [policy.to_json() for policy in policies]
        masters, states = self.communicator.bcast_obj(mine)
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.master = None if master is None else parameter.device.send(master)
        for policy, state in zip(policies, states, strict=True):
            policy.load_json(state)

    def _set(self, **attributes: Any) -> None:
        """Set attributes of this optimizer; ordinary assignment reaches the optimizer inside."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)


def prepare_multi_node(optimizer: Any) -> Any:
    """Prepare a multi-node optimizer and the optimizer inside it; see `ada_loss.chainer.prepare`."""
    if isinstance(optimizer, _DoubleBufferingOptimizer):
        raise ValueError(
            "Double buffering averages gradients while the next ones are computed, so a step cannot be "
            "skipped on overflow: create the multi-node optimizer with double_buffering=False."
        )
    prepare_step(optimizer.actual_optimizer)
    prepare_in_place(optimizer, PreparedMultiNodeOptimizer)
    for scope in scopes(optimizer.actual_optimizer.target):
        scope.policy.shared = True
    optimizer.actual_optimizer.announces = optimizer.communicator.rank == 0
    return optimizer
