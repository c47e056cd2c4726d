"""The processes that train together: one alone, or those that an MPI launcher started."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, TypeVar

import chainer
from chainer.backends import cuda

from errors import (
    BAD_INPUT,
    INTERRUPTED,
    InputError,
    SharedInputError,
    as_input_error,
    say_interrupted,
)

T = TypeVar("T")

COMMUNICATORS = ("auto", "naive", "flat", "pure_nccl")
# How launchers (MPICH and its relatives, Open MPI, MVAPICH) tell how many processes they started.
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Alone:
    """One process without MPI."""

    rank = 0
    size = 1
    intra_rank = 0

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        return [value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value on rank 0; an empty list on the others."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value

    def mean(self, value: float) -> float:
        """The mean over the ranks, on every rank."""
        return value

    def multi_node(self, optimizer: chainer.Optimizer) -> Any:
        """An optimizer that averages gradients over the ranks."""
        return optimizer

    def share_parameters(self, optimizer: Any) -> None:
        """Give every rank the parameters of rank 0; call it before the first update."""

    def share_statistics(self, model: chainer.Link) -> None:
        """Give every rank the mean over the ranks of what layers keep beside parameters, as running means."""

    def together(self, step: Callable[[], T]) -> T:
        """The result of a step that every rank takes; an InputError on one of them is raised on all."""
        return step()

    def rank_0_first(self, step: Callable[[], T]) -> T:
        """As `together`, for a step that is better not taken by several ranks at once."""
        first = self.together(lambda: step() if self.rank == 0 else None)
        others = self.together(lambda: step() if self.rank else None)
        return first if self.rank == 0 else others  # type: ignore[return-value]

    def connected(self, communicator: str) -> Alone:
        """The same ranks, whose gradients travel by the communicator of ChainerMN of this name."""
        return self

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """In this block an error on one rank ends all of them; one that all have ends each by itself."""
        with self._interruptible():
            try:
                yield
            except SharedInputError:
                raise
            except BaseException as error:
                self._fail(error)

    def _interruptible(self) -> AbstractContextManager[None]:
        """In this block Ctrl-C ends every rank, and is one line."""
        return nullcontext()

    def _fail(self, error: BaseException) -> NoReturn:
        raise error


class Together(Alone):
    """The ranks of an MPI job, on a ChainerMN communicator."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.rank
        self.size = comm.size
        self.intra_rank = comm.intra_rank

    def all_gather(self, value: T) -> list[T]:
        return self._comm.mpi_comm.allgather(value)

    def gather(self, value: T) -> list[T]:
        return self._comm.mpi_comm.gather(value) or []

    def broadcast(self, value: T) -> T:
        return self._comm.mpi_comm.bcast(value)

    def mean(self, value: float) -> float:
        return self._comm.mpi_comm.allreduce(value) / self.size

    def multi_node(self, optimizer: chainer.Optimizer) -> Any:
        import chainermn

        return chainermn.create_multi_node_optimizer(optimizer, self._comm)

    def share_parameters(self, optimizer: Any) -> None:
        self._comm.bcast_data(optimizer.target)
        # ChainerMN's first update would only do the same, and lose its gradients; asked now, it knows it is
        # done.
        optimizer.is_changed(optimizer.target)

    def share_statistics(self, model: chainer.Link) -> None:
        from chainermn.extensions import AllreducePersistent

        AllreducePersistent(model, self._comm)()

    def together(self, step: Callable[[], T]) -> T:
        result, message = None, None
        try:
            result = step()
        except (InputError, OSError) as caught:
            error = as_input_error(caught)
            if error is None:
                raise
            message = str(error)
        for rank, failure in enumerate(self.all_gather(message)):
            if failure is not None:
                raise SharedInputError(failure if rank == 0 else f"{failure} (seen by rank {rank})")
        return result  # type: ignore[return-value]

    def connected(self, communicator: str) -> Alone:
        import chainermn

        return Together(chainermn.create_communicator(communicator, self._comm.mpi_comm))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        # Python hands an interrupt to the main thread, which may wait for another rank for ever. A thread at
        # the other end of this hears of it at once.
        listening, heard = socket.socketpair()
        heard.setblocking(False)
        before = signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_when_interrupted, args=(listening,), daemon=True).start()
        try:
            yield
        except KeyboardInterrupt:
            # The thread ends this process.
            threading.Event().wait()
        finally:
            signal.set_wakeup_fd(before)
            heard.close()

    def _end_when_interrupted(self, listening: socket.socket) -> None:
        with listening:
            while number := listening.recv(1):
                if number[0] == signal.SIGINT:
                    sys.stdout.flush()
                    say_interrupted()
                    os._exit(INTERRUPTED)

    def _fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, KeyboardInterrupt):
            raise error
        bad_input = as_input_error(error)
        text = f"error: {bad_input}" if bad_input else "".join(traceback.format_exception(error))
        print(f"rank {self.rank} of {self.size} failed, ending all: {text}", file=sys.stderr, flush=True)
        # The others may wait in a collective call for ever.
        self._comm.mpi_comm.Abort(BAD_INPUT if bad_input else 1)
        raise error


def launched_size() -> int | None:
    """How many processes an MPI launcher started; None without a launcher."""
    return next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), None)


def start_ranks() -> Alone:
    """Join the other ranks if there are any. Raises InputError if the launcher's MPI is not Python's."""
    size = launched_size()
    if size is None:
        return Alone()
    try:
        import chainermn
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"An MPI launcher started {size} processes but MPI can't be used ({reason}): install mpi4py and "
            "an MPI (pip install mpi4py mpich), or run without the launcher."
        ) from None
    if MPI.COMM_WORLD.size != size:
        raise InputError(
            f"The launcher started {size} processes but MPI sees {MPI.COMM_WORLD.size}: use the mpiexec of "
            "the MPI that mpi4py loads (the one beside this Python, if that was installed by pip)."
        )
    return Together(chainermn.create_communicator("naive"))


def choose_device(name: str, ranks: Alone) -> int | None:
    """The number of the GPU that "auto", "cpu", "gpu" or a number stands for here, None for the CPU. Raises
    InputError if there is no such GPU."""
    if name == "cpu" or (name == "auto" and not gpu_is_there()):
        return None
    if not gpu_is_there():
        raise InputError(f"--device {name} needs a GPU and CuPy, and there is none: use --device cpu.")
    if not name.isdecimal():
        return ranks.intra_rank
    if ranks.size > 1:
        raise InputError(
            f"--device {name} is for one process, and every rank has a GPU of its own: leave it out, and "
            "choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    n_devices = cuda.cupy.cuda.runtime.getDeviceCount()
    if int(name) >= n_devices:
        raise InputError(f"There is no GPU {name}: they are numbered from 0 to {n_devices - 1}.")
    return int(name)


def choose_communicator(name: str, on_gpu: bool) -> str:
    """What a name of COMMUNICATORS stands for here. Raises InputError if this machine can't run it."""
    if name == "auto":
        return ("pure_nccl" if nccl_is_there() else "flat") if on_gpu else "naive"
    if name != "naive" and not on_gpu:
        raise InputError(
            f"The communicator {name} needs a GPU and CuPy: use --communicator naive on the CPU."
        )
    if name == "pure_nccl" and not nccl_is_there():
        raise InputError("The communicator pure_nccl needs a CuPy with NCCL: use --communicator flat.")
    return name


def nccl_is_there() -> bool:
    try:
        from cupy.cuda import nccl
    except ImportError:
        return False
    # CuPy puts an empty module in the place of one that it was built without.
    return getattr(nccl, "available", True)


def gpu_is_there() -> bool:
    return cuda.available and cuda.cupy.cuda.is_available()
