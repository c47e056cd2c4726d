"""What training shows and writes while it runs: progress, table, JSON, CSV, TensorBoard."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainer.training import Extension, Trainer, extensions
from chainer.training.extension import PRIORITY_EDITOR, PRIORITY_READER

from ada_loss.core.verdicts import percent, power
from errors import InputError
from files import write_whole
from pictures import draw_pictures
from ranks import Alone

LOG_FILE = "log.json"
CSV_FILE = "log.csv"
LOSSES = ("main/loss", "main/loss/loc", "main/loss/conf")
SCALES = ("scale", "scale/min", "scale/max", "underflow", "skipped")
COLUMNS = ("epoch", "iteration", *LOSSES, "lr", *SCALES, "map", "elapsed_time", "time_left")
ERASE = "\033[J"

Trigger = Callable[[Trainer], bool]


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
    pace = Pace()
    trainer.extend(pace)
    log = extensions.LogReport(
        trigger=due,
        filename=LOG_FILE if first else None,
        log_name=None,
        postprocess=lambda row: _complete_row(row, ranks, pace.seconds_left(last)),
    )
    trainer.extend(log, name="LogReport", trigger=(1, "iteration"))
    if not first:
        return
    on_terminal = sys.stdout.isatty()
    trainer.extend(Table(ERASE if on_terminal else ""), trigger=due)
    trainer.extend(_write_csv, name="CsvReport", trigger=due)
    trainer.extend(_draw, name="Pictures", trigger=drawn)
    if on_terminal:
        trainer.extend(extensions.ProgressBar(update_interval=Pace.INTERVAL))
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


class Pace(Extension):
    """How fast training has been of late, reckoned as Chainer's progress bar reckons it."""

    INTERVAL, REMEMBERED = 5, 100

    trigger = (1, "iteration")
    priority = PRIORITY_EDITOR

    def __init__(self) -> None:
        self._times: deque[tuple[int, float]] = deque(maxlen=self.REMEMBERED)
        self._now = 0, 0.0

    def initialize(self, trainer: Trainer) -> None:
        self._times.append((trainer.updater.iteration, time.monotonic()))

    def __call__(self, trainer: Trainer) -> None:
        self._now = trainer.updater.iteration, time.monotonic()
        if trainer.updater.iteration % self.INTERVAL == 0:
            self._times.append(self._now)

    def seconds_left(self, last: int) -> int:
        """The time to the iteration `last`, in seconds."""
        iteration, now = self._now
        before, then = self._times[0]
        return round((now - then) / max(1, iteration - before) * (last - iteration))


class Table(Extension):
    """Prints the log's newest row under a heading, in 80 columns.

    Args:
        erase: what to write before a row, to remove a progress bar that stands there.
    """

    # As LogReport, behind which it has to come.
    priority = PRIORITY_READER

    def __init__(self, erase: str) -> None:
        self._erase = erase
        self._begun = False

    def __call__(self, trainer: Trainer) -> None:
        rows = log_rows(trainer)
        if not self._begun:
            self._begun = True
            print(self._erase + heading())
        print(self._erase + table_row(rows[-1]), flush=True)


def heading() -> str:
    """The heading of the table."""
    return " ".join(f"{name:>{width}}" for name, width, _ in _TABLE)


def table_row(row: Mapping[str, float]) -> str:
    """A row of the log in 80 columns."""
    return " ".join(f"{text(row):>{width}}" for _, width, text in _TABLE)


def duration(seconds: float) -> str:
    """A time as the progress bar writes it, h:mm:ss, and with days in hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _number(name: str, form: str) -> Callable[[Mapping[str, float]], str]:
    return lambda row: format(row[name], form) if name in row else ""


def _scales(row: Mapping[str, float]) -> str:
    """The scales that gradients carry, as powers of two."""
    if "scale/min" not in row:
        return ""
    low, high = (power(math.log2(row[name])) for name in ("scale/min", "scale/max"))
    return low if low == high else f"{low}..{high}"


def _underflow(row: Mapping[str, float]) -> str:
    return percent(row["underflow"]).replace("under ", "<") if "underflow" in row else ""


_TABLE: tuple[tuple[str, int, Callable[[Mapping[str, float]], str]], ...] = (
    ("iteration", 9, _number("iteration", ".0f")),
    ("loss", 8, _number("main/loss", ".4g")),
    ("lr", 8, _number("lr", ".3g")),
    ("scales", 11, _scales),
    ("underflow", 9, _underflow),
    ("skipped", 7, _number("skipped", ".0f")),
    ("mAP", 6, _number("map", ".4f")),
    ("time left", 9, lambda row: duration(row["time_left"])),
)
"""The columns of the table: their names, widths and contents."""


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


def _complete_row(row: dict[str, float], ranks: Alone, seconds_left: int) -> None:
    # All ranks skip the same steps; a row of skipped ones has no losses.
    for name in LOSSES:
        if name in row:
            row[name] = ranks.mean(row[name])
    row["time_left"] = seconds_left


def _draw(trainer: Trainer) -> None:
    draw_pictures(log_rows(trainer), Path(trainer.out))


def _write_csv(trainer: Trainer) -> None:
    write_whole(Path(trainer.out) / CSV_FILE, csv_text(log_rows(trainer)))
