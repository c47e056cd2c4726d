"""What training shows and writes while it runs: progress, table, JSON, CSV, TensorBoard."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainer.training import Extension, Trainer, extensions
from chainer.training.extension import PRIORITY_EDITOR

from errors import InputError
from files import write_whole
from pictures import draw_pictures
from ranks import Alone

LOG_FILE = "log.json"
CSV_FILE = "log.csv"
LOSSES = ("main/loss", "main/loss/loc", "main/loss/conf")
COLUMNS = ("epoch", "iteration", *LOSSES, "lr", "scale", "skipped", "map", "elapsed_time", "time_left")
PRINTED = ("iteration", "main/loss", "lr", "scale", "skipped", "map", "elapsed_time", "time_left")
ERASE = "\033[J"

Trigger = Callable[[Trainer], bool]


class PlainStream:
    """Standard output without the control codes that Chainer's reports move the cursor with."""

    def write(self, text: str) -> None:
        sys.stdout.write(text.replace(ERASE, ""))

    def flush(self) -> None:
        sys.stdout.flush()


class StopAfter:
    """The trigger that ends training; unlike Chainer's it also ends a run that is resumed at its end."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def __call__(self, trainer: Trainer) -> bool:
        return trainer.updater.iteration >= self._iterations

    def get_training_length(self) -> tuple[int, str]:
        return self._iterations, "iteration"


def every(interval: int, last: int) -> Trigger:
    """Fires every `interval` iterations and at the last one."""
    return lambda trainer: trainer.updater.iteration % interval == 0 or trainer.updater.iteration == last


def at(iterations: Sequence[int]) -> Trigger:
    """Fires at the iterations named."""
    wanted = frozenset(iterations)
    return lambda trainer: trainer.updater.iteration in wanted


def either(first: Trigger, second: Trigger) -> Trigger:
    """Fires when one of two does."""
    return lambda trainer: first(trainer) or second(trainer)


def add_reports(
    trainer: Trainer, ranks: Alone, due: Trigger, drawn: Trigger, last: int, tensorboard: bool
) -> None:
    """Give a trainer everything in this module; on all ranks alike, shown and written by rank 0.

    A row of the log is written whenever `due` fires. It holds means over the iterations since the last one,
    but for those whose step was skipped. Pictures of it are drawn whenever `drawn` fires.
    """
    first = ranks.rank == 0
    log = extensions.LogReport(
        trigger=due,
        filename=LOG_FILE if first else None,
        log_name=None,
        postprocess=lambda row: _complete_row(row, ranks, last),
    )
    trainer.extend(log, name="LogReport", trigger=(1, "iteration"))
    if not first:
        return
    on_terminal = sys.stdout.isatty()
    stream = sys.stdout if on_terminal else PlainStream()
    trainer.extend(extensions.PrintReport(PRINTED, out=stream), trigger=due)
    trainer.extend(_write_csv, name="CsvReport", trigger=due)
    trainer.extend(_draw, name="Pictures", trigger=drawn)
    if on_terminal:
        trainer.extend(extensions.ProgressBar(update_interval=5))
    if tensorboard:
        trainer.extend(TensorBoard(), trigger=due)


def log_rows(trainer: Trainer) -> list[dict[str, float]]:
    return trainer.get_extension("LogReport").log


class LeavesOutSkippedSteps(Extension):
    """Takes the losses of a skipped step away before the log adds them to its means.

    Args:
        skipped: how many steps were skipped so far.
    """

    trigger = (1, "iteration")
    priority = PRIORITY_EDITOR

    def __init__(self, skipped: Callable[[], int]) -> None:
        self._count_skipped = skipped

    def initialize(self, trainer: Trainer) -> None:
        self._before = self._count_skipped()

    def __call__(self, trainer: Trainer) -> None:
        skipped = self._count_skipped()
        if skipped > self._before:
            for name in LOSSES:
                trainer.observation.pop(name, None)
        self._before = skipped


class TensorBoard(Extension):
    """Passes the log's newest row on to TensorBoard."""

    _writer: Any = None

    def initialize(self, trainer: Trainer) -> None:
        # Steps of a killed run that are repeated now replace those of then.
        step = trainer.updater.iteration + 1
        self._writer = find_summary_writer()(str(Path(trainer.out) / "tensorboard"), purge_step=step)

    def __call__(self, trainer: Trainer) -> None:
        row = log_rows(trainer)[-1]
        for name in row.keys() - {"iteration"}:
            self._writer.add_scalar(name, row[name], row["iteration"])
        self._writer.flush()

    def finalize(self) -> None:
        self._writer.close()


def find_summary_writer() -> Callable[[str], Any]:
    """The class that writes for TensorBoard, from whichever package has it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "--tensorboard needs a package that is not there: pip install tensorboardX."
            ) from None
    return SummaryWriter


def csv_text(rows: Sequence[Mapping[str, float]]) -> str:
    """The log as CSV; the columns that only some rows have are empty in the others."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    columns += sorted({name for row in rows for name in row} - set(columns))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _complete_row(row: dict[str, float], ranks: Alone, last: int) -> None:
    # All ranks skip the same steps; a row of skipped ones has no losses.
    for name in LOSSES:
        if name in row:
            row[name] = ranks.mean(row[name])
    row["time_left"] = round(row["elapsed_time"] / row["iteration"] * (last - row["iteration"]))


def _draw(trainer: Trainer) -> None:
    draw_pictures(log_rows(trainer), Path(trainer.out))


def _write_csv(trainer: Trainer) -> None:
    write_whole(Path(trainer.out) / CSV_FILE, csv_text(log_rows(trainer)))
