"""Training on several ranks, or in a single process on the same data."""

from __future__ import annotations

from functools import partial
from typing import Any

import ada_loss.chainer as ada_loss_chainer

import chainer  # isort: skip
import chainer.functions as F
import numpy as np
from chainer import optimizer_hooks, optimizers

from toy import batch, masters

BATCH = 12


class Alone:
    """The one rank of a training that is not distributed."""

    rank, size = 0, 1


HOOKS = (partial(optimizer_hooks.WeightDecay, 0.01), partial(optimizer_hooks.GradientClipping, 0.5))


def prepared(
    target: chainer.Link, comm: Any, optimizer: Any = None, *, hooks: Any = HOOKS, **options: Any
) -> Any:
    """A prepared optimizer, on several ranks ChainerMN's."""
    optimizer = optimizer or optimizers.MomentumSGD(0.05)
    if comm.size > 1:
        import chainermn

        optimizer = chainermn.create_multi_node_optimizer(optimizer, comm, **options)
    optimizer.setup(target)
    for hook in hooks:
        optimizer.add_hook(hook())
    return ada_loss_chainer.prepare(optimizer)


def share(arrays: Any, comm: Any) -> Any:
    """This rank's part of a batch."""
    count = len(arrays[0]) // comm.size
    return [array[comm.rank * count : (comm.rank + 1) * count] for array in arrays]


def steps(target: chainer.Link, optimizer: Any, comm: Any, magnitudes: Any, seed: int = 50) -> None:
    """A step for each entry of `magnitudes`: how large the targets are, of each sample or of all."""
    rng = np.random.default_rng(seed)
    if comm.size > 1 and not optimizer.target_params:
        optimizer.update(target, *share(batch(rng, BATCH), comm))
    rng = np.random.default_rng(seed)
    for magnitude in magnitudes:
        x, t = batch(rng, BATCH)
        optimizer.update(target, *share((x, t * np.broadcast_to(magnitude, (BATCH,))[:, None]), comm))


def no_norm(channels: int) -> chainer.Link:
    return chainer.Sequential(F.identity)


def outcome(target: chainer.Link, optimizer: Any) -> dict[str, Any]:
    policy = target.model.ada_loss.policy
    scales = np.array([policy.entry.exponent, policy.entry.skipped, policy.iteration])
    return {**masters(target), "scales": scales, "steps": np.array(optimizer.t)}
