"""Cases of `mn_program`: what ranks tell each other, and what they agree on."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np

from helpers import dtype
from mn_training import BATCH, no_norm, prepared, steps
from toy import training


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
    from ada_loss.chainer.gradient import InFlight
    from ada_loss.chainer.mn import lend_at_agreed_exponents
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
            parameter.receive(InFlight(np.full(3, array, np.float16), -int(exponent)), 1.0)
        parameters.append(parameter)
    agreed = lend_at_agreed_exponents(parameters, Many())
    lent = {name: p.grad for name, p in zip(held, parameters, strict=True)}
    return {
        **{name: np.zeros(0) if array is None else array for name, array in lent.items()},
        "agreed": np.array(agreed),
    }


def delayed(comm: Any) -> dict[str, Any]:
    """Measurements and shifts of ranks whose gradients differ in size, after some steps of delayed timing."""
    with dtype("mixed16"):
        target = training(method="auto", timing="delayed", norm=no_norm)
        steps(target, prepared(target, comm), comm, [4.0 ** np.arange(BATCH)] * 3)
    measured = {d.site.path + str(d.site.call): d.measurement for d in target.model.decisions}
    return {
        **{f"shift {d.site.path} {d.site.call}": np.array(d.shift) for d in target.model.decisions},
        **{f"largest {path}": np.array(m.largest_term) for path, m in measured.items()},
        "counts": np.array([m.gradient.count for m in measured.values()]),
    }


def statistics(comm: Any) -> dict[str, Any]:
    """Gradients brought to one exponent, as before ranks average statistics of them."""
    from ada_loss.chainer.gradient import InFlight
    from ada_loss.chainer.mn import at_agreed_exponent

    last = comm.rank == comm.size - 1
    held = {
        "equal": InFlight(np.float16([1, 2]), 7),
        "different": InFlight(np.float16([1, 2]), 3 * comm.rank),
        "zero here": InFlight(np.float16([0, 0] if comm.rank == 0 else [1, 2]), 5 if comm.rank == 0 else -5),
        "zero": InFlight(np.float16([0, 0]), comm.rank),
        "no room": InFlight(np.float16([6e4, 1] if comm.rank == 0 else [1, 2]), 8 * comm.rank),
        "infinite": InFlight(np.float16([np.inf if last else 1, 2]), comm.rank),
    }
    agreed = {name: at_agreed_exponent(gradient, comm) for name, gradient in held.items()}
    return {
        **{name: gradient.array for name, gradient in agreed.items()},
        **{f"{name} exponent": np.array(gradient.exponent) for name, gradient in agreed.items()},
    }
