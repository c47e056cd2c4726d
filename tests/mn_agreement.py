"""Cases of `mn_program`: what ranks tell each other, and what they agree on."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np
from chainer import optimizers

from ada_loss.core.config import AdaLossConfig
from helpers import dtype
from mn_training import BATCH, no_norm, prepared, share, steps
from toy import batch, masters, training


class Counting:
    """An MPI communicator that counts how often integers are reduced."""

    def __init__(self, mpi_comm: Any) -> None:
        self._mpi_comm = mpi_comm
        self.sizes: list[int] = []

    def Allreduce(self, send: Any, receive: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(receive, np.ndarray) and receive.dtype.kind == "i":
            self.sizes.append(receive.size)
        return self._mpi_comm.Allreduce(send, receive, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mpi_comm, name)


def communication(comm: Any) -> dict[str, Any]:
    """How many integers are reduced in three steps."""
    mpi_comm, comm.mpi_comm = comm.mpi_comm, Counting(comm.mpi_comm)
    with dtype("mixed16"):
        target = training(norm=no_norm)
        steps(target, prepared(target, comm), comm, [1, 1, 1])
    sizes, comm.mpi_comm = comm.mpi_comm.sizes, mpi_comm
    return {"sizes": np.array(sizes), "parameters": np.array(len(list(target.params())))}


def exponents(comm: Any) -> dict[str, Any]:
    """What is lent of gradients that ranks see differently, if there were 64 ranks to add them up."""
    from ada_loss.chainer.agreement import expose_at_agreed_exponents
    from ada_loss.chainer.gradient import ScaledGradient
    from ada_loss.chainer.parameters import adopt

    held = {
        "large": 2.0**14,
        "tiny": 2.0**-20,
        "different": 2.0 ** (-20 * comm.rank),
        "zero here": float(comm.rank > 0) * 2.0**-18,
        "missing here": None if comm.rank == 0 else 2.0**-18,
        "zero": 0.0,
        "missing": None,
        "infinite": np.inf if comm.rank == 0 else 1.0,
    }

    class Many:
        size, mpi_comm = 64, comm.mpi_comm

    parameters = []
    for value in held.values():
        parameter = adopt(chainer.Parameter(np.zeros(3, np.float16)))
        parameter.cleargrad()
        if value is not None:
            array, exponent = np.frexp(value)
            parameter.receive(ScaledGradient(np.full(3, array, np.float16), -int(exponent)), 1.0)
        parameters.append(parameter)
    agreed = expose_at_agreed_exponents(parameters, Many()).exponents
    lent = {name: p.grad for name, p in zip(held, parameters, strict=True)}
    return {
        **{name: np.zeros(0) if array is None else array for name, array in lent.items()},
        "agreed": np.array(agreed),
    }


class Listening:
    """An MPI communicator that keeps what this rank has told of its last step."""

    def __init__(self, mpi_comm: Any) -> None:
        self._mpi_comm = mpi_comm
        self.told: Any = None

    def allreduce(self, mine: Any, **kwargs: Any) -> Any:
        self.told = mine
        return self._mpi_comm.allreduce(mine, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mpi_comm, name)


def delayed(comm: Any) -> dict[str, Any]:
    """What ranks whose gradients differ in size know after some steps of delayed timing, and what each would
    know on its own."""
    mpi_comm, comm.mpi_comm = comm.mpi_comm, Listening(comm.mpi_comm)
    with dtype("mixed16"):
        target = training(method="auto", timing="delayed", norm=no_norm)
        steps(target, prepared(target, comm), comm, [2.0 ** np.arange(BATCH)] * 3)
    own, comm.mpi_comm = comm.mpi_comm.told.ranges, mpi_comm
    decisions = target.model.ada_loss.decisions
    return {
        "shifts": np.array([d.shift for d in decisions]),
        "safe": np.array([d.range.safe for d in decisions]),
        "own": np.array([own[d.site].safe for d in decisions]),
    }


def accumulation(comm: Any) -> dict[str, Any]:
    """What is known, and what became of the parameters, after every one of some delayed steps of several
    backward passes each."""
    with dtype("mixed16"):
        target = training(method="auto", timing="delayed", norm=no_norm)
        optimizer = prepared(target, comm)
        steps(target, optimizer, comm, [1])
        rng, found = np.random.default_rng(51), {}
        for step in range(3):
            target.cleargrads()
            for magnitude in (1.0, 2.0, 0.125):
                x, t = batch(rng, BATCH)
                target(*share((x, t * magnitude * 2.0 ** np.arange(BATCH)[:, None]), comm)).backward()
            optimizer.update()
            known = [[d.range.safe, d.range.wanted] for d in target.model.ada_loss.decisions]
            found[f"known after step {step}"] = np.array(known)
            found |= {f"{path} after step {step}": array for path, array in masters(target).items()}
    return found


def own_timing(comm: Any) -> dict[str, Any]:
    """The shifts of a layer that alone is delayed, in steps whose gradients become smaller by 2**-4 each."""
    with dtype("mixed16"):
        target = training(method="auto", norm=no_norm)
        target.model.last.ada_loss_config = AdaLossConfig(loss_scale_method="auto", timing="delayed")
        optimizer = prepared(target, comm, optimizers.SGD(0.0), hooks=())
        shifts = []
        for step in range(6):
            target.weight = 2.0 ** (-4 * step)
            steps(target, optimizer, comm, [1])
            shifts += [
                d.shift + d.exponent for d in target.model.ada_loss.decisions if d.site.path == "/last"
            ]
    return {"shifts": np.array(shifts[2:])}


def statistics(comm: Any) -> dict[str, Any]:
    """Gradients brought to one exponent, as before ranks average statistics of them."""
    from ada_loss.chainer.agreement import at_agreed_exponent
    from ada_loss.chainer.gradient import ScaledGradient

    last = comm.rank == comm.size - 1
    held = {
        "equal": ScaledGradient(np.float16([1, 2]), 7),
        "different": ScaledGradient(np.float16([1, 2]), 3 * comm.rank),
        "zero here": ScaledGradient(
            np.float16([0, 0] if comm.rank == 0 else [1, 2]), 5 if comm.rank == 0 else -5
        ),
        "zero": ScaledGradient(np.float16([0, 0]), comm.rank),
        "no room": ScaledGradient(np.float16([6e4, 1] if comm.rank == 0 else [1, 2]), 8 * comm.rank),
        "infinite": ScaledGradient(np.float16([np.inf if last else 1, 2]), comm.rank),
    }
    agreed = {name: at_agreed_exponent(gradient, comm) for name, gradient in held.items()}
    return {
        **{name: gradient.array for name, gradient in agreed.items()},
        **{f"{name} exponent": np.array(gradient.exponent) for name, gradient in agreed.items()},
    }
