"""Counts what a process hands to MPI for reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI


class CountingComm(MPI.Intracomm):
    """A communicator like the one that it is made of, which counts the bytes of its all-reduces."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._gradients = self._agreement = 0

    @property
    def sent(self) -> dict[str, int]:
        """Bytes of floating-point numbers, and of the integers that ranks agree on."""
        return {"gradients": self._gradients, "agreement": self._agreement}

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        array, *_ = recvbuf if isinstance(recvbuf, (list, tuple)) else (recvbuf,)
        if np.asarray(array).dtype.kind == "i":
            self._agreement += array.nbytes
        else:
            self._gradients += array.nbytes
        super().Allreduce(sendbuf, recvbuf, op)
