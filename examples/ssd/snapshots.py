"""Weights that a run keeps besides those at its end: the best, and the last good ones if it diverges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from chainer.training import Extension, Trainer
from chainercv.links.model.ssd import SSD

from ranks import Alone
from weights import save_weights, weights_of

BEST_FILE = "best.npz"


class BestWeights(Extension):
    """Writes the weights whenever an evaluation finds a higher mAP than all before."""

    def __init__(self, model: SSD, ranks: Alone) -> None:
        self._model = model
        self._ranks = ranks
        self._best = -1.0

    def __call__(self, trainer: Trainer) -> None:
        # Only rank 0 knows, and the others keep what it does, for the checkpoint.
        found = self._ranks.broadcast(trainer.observation.get("map", -1.0))
        if found > self._best:
            self._best = float(found)
            if self._ranks.rank == 0:
                save_weights(Path(trainer.out) / BEST_FILE, weights_of(self._model))

    def serialize(self, serializer: Any) -> None:
        self._best = float(serializer("best", self._best))


class LastGoodWeights(Extension):
    """Holds the newest weights, of those after each row of the log, with which a step could be taken.

    That their gradients were finite shows in the step after them, so a copy waits for it.

    Args:
        model: whose weights.
        skipped: how many steps were skipped so far.
        due: when to copy the weights.
    """

    def __init__(self, model: SSD, skipped: Callable[[], int], due: Callable[[Trainer], bool]) -> None:
        self._model = model
        self._count_skipped = skipped
        self._due = due

    def initialize(self, trainer: Trainer) -> None:
        self._skipped = self._count_skipped()
        self._good = self._waiting = self._copy(trainer)

    def __call__(self, trainer: Trainer) -> None:
        skipped = self._count_skipped()
        if skipped == self._skipped:
            self._good = self._waiting
        self._skipped = skipped
        if self._due(trainer):
            self._waiting = self._copy(trainer)

    @property
    def iteration(self) -> int:
        return self._good[0]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return self._good[1]

    def _copy(self, trainer: Trainer) -> tuple[int, dict[str, np.ndarray]]:
        arrays = {name: array.copy() for name, array in weights_of(self._model).items()}
        return trainer.updater.iteration, arrays
