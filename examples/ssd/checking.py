"""A look at a whole data set before training begins: every annotation, and the beginning of every image."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from data_voc import JoinedDatasets
from errors import InputError, SharedInputError, caution
from ranks import Alone

# Sets of more images show how far the look is.
LARGE = 2000
MOST_NAMED = 5
BAR = 40


def look_through(train_set: JoinedDatasets, test_set: JoinedDatasets, ranks: Alone) -> None:
    """Raises InputError on all ranks, which share the work, if a file is damaged, or if there is nothing to
    learn; says so if there is nothing to find."""
    if not _count_objects(train_set, "training", ranks):
        raise SharedInputError(
            "No training image shows an object of a class that is known here: there is nothing to learn."
        )
    if not _count_objects(test_set, "test", ranks) and ranks.rank == 0:
        caution("No test image shows an object that counts: there will be no mAP.")


def _count_objects(dataset: JoinedDatasets, what: str, ranks: Alone) -> int:
    indices = range(ranks.rank, len(dataset), ranks.size)
    shown = _with_progress(indices, what) if ranks.rank == 0 and len(dataset) > LARGE else indices
    return sum(ranks.all_gather(ranks.together(lambda: _look(dataset, shown))))


def _look(dataset: JoinedDatasets, indices: Iterator[int] | range) -> int:
    """The number of objects that count. An InputError tells of the first damaged file and names others."""
    n_objects, faults = 0, []
    for i in indices:
        try:
            n_objects += int((~dataset.objects(i).difficult).sum())
        except InputError as error:
            faults.append((dataset.image_path(i).stem, str(error)))
    if faults:
        (_, first), *others = faults
        named = ", ".join(name for name, _ in others[:MOST_NAMED]) + (", ..." if others[MOST_NAMED:] else "")
        more = f", and so are {len(others)} others ({named})." if others else "."
        raise InputError(first.removesuffix(".") + more)
    return n_objects


def _with_progress(indices: range, what: str) -> Iterator[int]:
    """The indices, with a bar on standard error; where that is no terminal, with a line now and then."""
    terminal = sys.stderr.isatty()
    shown, began = -1, time.monotonic()
    for done, i in enumerate(indices):
        share = done / len(indices)
        step = int(share * (100 if terminal else 4))
        if step > shown:
            shown = step
            bar = f"[{'#' * int(share * BAR):.<{BAR}}] " if terminal else ""
            _show(f"looking through the {what} images {bar}{share:.0%}", end="" if terminal else "\n")
        yield i
    _show(f"looked through {len(indices)} {what} images in {time.monotonic() - began:.0f} s", end="\n")


def _show(text: str, end: str) -> None:
    """A line on standard error; on a terminal in the place of the one before."""
    line = f"\r{text:<{BAR + 50}}" if sys.stderr.isatty() else text
    print(line, end=end, file=sys.stderr, flush=True)
