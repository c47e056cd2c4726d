"""The order in which training sees its samples, and the iterator that hands out their batches."""

from __future__ import annotations

import ada_loss.chainer  # noqa: F401  isort: skip  (loader processes start here)

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

import cv2
import numpy as np
from chainer.dataset import Iterator

Sample = tuple[Any, ...]

BATCHES_AHEAD = 3


class Samples(Protocol):
    """Prepares samples; a pure function of (epoch, index), so any process may do it at any time."""

    def sample(self, epoch: int, index: int) -> Sample: ...


@dataclass(frozen=True)
class Schedule:
    """Which samples a rank takes in which iteration; the ranks' shares together are one rank's whole batch.

    Samples come in a random order, each once an epoch, one epoch behind the other without a gap.

    Attributes:
        n_samples: size of the data set.
        batch_size: samples of an iteration, over all ranks.
        seed: of the order.
        rank, n_ranks: this rank's number and how many there are; batch_size is a multiple of n_ranks.
    """

    n_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    n_ranks: int = 1

    def share(self, iteration: int) -> list[tuple[int, int]]:
        """(epoch, index) of this rank's samples in an iteration, counted from 0."""
        size = self.batch_size // self.n_ranks
        first = iteration * self.batch_size + self.rank * size
        places = [divmod(position, self.n_samples) for position in range(first, first + size)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [(epoch, int(orders[epoch][place])) for epoch, place in places]

    def epochs(self, iteration: int) -> float:
        """How many epochs have passed after so many iterations."""
        return iteration * self.batch_size / self.n_samples

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_samples)


class BatchIterator(Iterator):
    """Hands out one batch (a list of samples) an iteration, for ever.

    All its state is the number of batches that it has given out: what is prepared ahead can be prepared
        again.

    Args:
        samples: prepares a sample from (epoch, index).
        schedule: which ones are due.
        loaders: number of processes that prepare batches ahead; 0 to prepare them when they are asked for.
    """

    def __init__(self, samples: Samples, schedule: Schedule, loaders: int = 0) -> None:
        self._schedule = schedule
        self._source = LoaderProcesses(samples, loaders) if loaders else InThisProcess(samples)
        self._pending: deque[list[Callable[[], Sample]]] = deque()
        self._given = 0

    def __next__(self) -> list[Sample]:
        while len(self._pending) < max(1, self._source.batches_ahead):
            share = self._schedule.share(self._given + len(self._pending))
            self._pending.append([self._source.request(epoch, index) for epoch, index in share])
        batch = [fetch() for fetch in self._pending.popleft()]
        self._given += 1
        return batch

    next = __next__

    @property
    def epoch(self) -> int:
        return int(self.epoch_detail)

    @property
    def epoch_detail(self) -> float:
        return self._schedule.epochs(self._given)

    @property
    def previous_epoch_detail(self) -> float:
        return self._schedule.epochs(max(self._given - 1, 0))

    @property
    def is_new_epoch(self) -> bool:
        return int(self.previous_epoch_detail) < self.epoch

    def serialize(self, serializer: Any) -> None:
        self._given = serializer("batches", self._given)
        self._pending.clear()

    def finalize(self) -> None:
        self._pending.clear()
        self._source.close()


class InThisProcess:
    """Prepares a sample when it is fetched."""

    batches_ahead = 0

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def request(self, epoch: int, index: int) -> Callable[[], Sample]:
        return lambda: self._samples.sample(epoch, index)

    def close(self) -> None:
        pass


class LoaderProcesses:
    """Prepares samples in other processes, from the moment that they are requested."""

    batches_ahead = BATCHES_AHEAD

    def __init__(self, samples: Samples, n_processes: int) -> None:
        # Neither MPI nor CUDA survives a fork.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            n_processes, multiprocessing.get_context("spawn"), _start_loader, (samples,)
        )

    def request(self, epoch: int, index: int) -> Callable[[], Sample]:
        return self._pool.submit(_load, epoch, index).result

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_samples_of_this_loader: Samples


def _start_loader(samples: Samples) -> None:
    global _samples_of_this_loader
    _samples_of_this_loader = samples
    cv2.setNumThreads(0)
    # Ctrl-C reaches every process of a terminal; the parent answers it for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent can't tell its loaders to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a loader, which has a parent"
    wait([parent.sentinel])
    os._exit(1)


def _load(epoch: int, index: int) -> Sample:
    return _samples_of_this_loader.sample(epoch, index)
