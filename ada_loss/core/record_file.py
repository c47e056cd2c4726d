"""Files of records: written while a run goes on, readable at any moment, whatever became of the run.

Every call of `write` is one write of the operating system, so a process that dies leaves whole records; only
a machine that stops, or a full disk, can cut the last line, and a reader leaves that out. A file that has
reached its size is thinned: of the sampled steps every second one goes, and of those to come only every
second one is taken. So the file stays below its size, and covers the whole run evenly, however long it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ada_loss.core.records import (
    EndRecord,
    PlaceRecord,
    Record,
    RunHeader,
    StepRecord,
    from_line,
    to_line,
)

FILE_NAME = "records.jsonl"
"""What the file is called in the directory of a run."""

MOST_BYTES = 64 << 20
"""How large a file may grow, unless told otherwise."""

MOST_SKIPS = 10_000
"""How many skipped steps are recorded one by one; later ones are only counted."""

_logger = logging.getLogger("ada_loss")


class RecordError(ValueError):
    """There are no records to read; the message says what is wrong and what to do."""


class RecordFile:
    """Writes the records of one run.

    A disk that cannot be written to any more ends the recording with a warning, and not the training.

    Args:
        path: the directory of the run, in which the file is called `FILE_NAME`; or the file, *.jsonl.
        header: what the run is.
        most_bytes: how large the file may grow.
        resume: go on behind the last whole record of a file that exists, which is replaced otherwise.

    Raises:
        ValueError: where `most_bytes` is too small for anything.
        OSError: where the file cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: RunHeader,
        *,
        most_bytes: int = MOST_BYTES,
        resume: bool = False,
    ) -> None:
        if most_bytes < 1 << 16:
            raise ValueError(f"most_bytes must be at least {1 << 16}, not {most_bytes}.")
        self.path = _in_directory(Path(path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._most_bytes = most_bytes
        self._thinned = 1
        self._skips = 0
        self._size = 0
        self._file: int | None = None
        kept = _whole_lines(self.path) if resume and self.path.exists() else b""
        self._replace([kept, to_line(header).encode()])

    @property
    def thinned(self) -> int:
        """Of how many sampled steps one is kept."""
        return self._thinned

    def wants(self, sample: int) -> bool:
        """Whether the sampled step number `sample`, counted from 0, will be kept."""
        return self._file is not None and sample % self._thinned == 0

    def write(self, records: Iterable[Record]) -> None:
        """Append records, all at once."""
        lines = "".join(to_line(record) for record in records if self._is_new(record)).encode()
        if self._file is None or not lines:
            return
        try:
            if self._size + len(lines) > self._most_bytes:
                self._thin()
            os.write(self._file, lines)
            self._size += len(lines)
        except OSError as error:
            self.close()
            _logger.warning("Records end here, the training goes on: %s.", error)

    def close(self) -> None:
        """Write nothing more; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_new(self, record: Record) -> bool:
        if isinstance(record, StepRecord) and record.skipped:
            self._skips += 1
            return self._skips <= MOST_SKIPS
        return True

    def _replace(self, parts: list[bytes]) -> None:
        """Give the file other contents, at once: who reads it meanwhile finds the former or the new ones."""
        draft = self.path.with_name(self.path.name + ".new")
        draft.write_bytes(b"".join(parts))
        draft.replace(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = sum(map(len, parts))

    def _thin(self) -> None:
        """Leave out every second sampled step, until half of the room is free or one sampled step is left."""
        while self._size > self._most_bytes // 2:
            with open(self.path, "rb") as lines:
                sampled = _sampled_steps(lines)
            keep = set(sampled[::2])
            with open(self.path, "rb") as lines:
                kept = [line for line in lines if _is_kept(line, keep)]
            self.close()
            self._replace(kept)
            self._thinned *= 2
            if len(sampled) < 2:
                return


class RecordsInMemory:
    """Keeps records of a short run in place of a file; see `RecordFile`.

    Args:
        header: what the run is.
    """

    def __init__(self, header: RunHeader) -> None:
        self.run = Run(Path(header.name), header)

    def wants(self, sample: int) -> bool:
        """Whether the sampled step number `sample` will be kept: always."""
        return True

    def write(self, records: Iterable[Record]) -> None:
        """Append records."""
        for record in records:
            _take(self.run, record)

    def close(self) -> None:
        """Do nothing."""


@dataclass
class Run:
    """The records of one run. damaged: how many lines could not be read, a cut last one not counted."""

    path: Path
    header: RunHeader
    places: list[PlaceRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    end: EndRecord | None = None
    damaged: int = 0


def read(path: str | os.PathLike[str]) -> Run:
    """The records of a run, also of one that goes on or that has crashed.

    Where a run was resumed, what it did once more counts.

    Args:
        path: the file, or the directory of the run.

    Raises:
        RecordError: where there is no such file, or its first line is not a header that this version reads.
    """
    path = _in_directory(Path(path))
    try:
        with open(path, "rb") as lines:
            return _read_lines(path, lines)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror or error}): name the directory of a recorded run."
        ) from None


def _read_lines(path: Path, lines: Iterable[bytes]) -> Run:
    records = _parse(lines)
    header = next(records, None)
    if isinstance(header, ValueError) and "version" in str(header):
        raise RecordError(f"{path}: {header}")
    if not isinstance(header, RunHeader):
        raise RecordError(f"{path} holds no records of ada_loss: its first line describes no run.")
    run = Run(path, header)
    for record in records:
        _take(run, record)
    places = {(record.step, record.place): record for record in run.places}
    run.places = [places[key] for key in sorted(places, key=lambda key: key[0])]
    steps = {record.step: record for record in run.steps}
    run.steps = [steps[step] for step in sorted(steps)]
    return run


def _take(run: Run, record: Record | ValueError) -> None:
    """Add a record, or what is wrong with one, to those of a run."""
    if isinstance(record, PlaceRecord):
        run.places.append(record)
    elif isinstance(record, StepRecord):
        run.steps.append(record)
    elif isinstance(record, RunHeader):
        run.header, run.end = record, None
    elif isinstance(record, EndRecord):
        run.end = record
    else:
        run.damaged += 1


def _parse(lines: Iterable[bytes]) -> Iterator[Record | ValueError]:
    """The record of each whole line, or what is wrong with it."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        try:
            record = from_line(line)
        except (ValueError, TypeError) as error:
            yield error if isinstance(error, ValueError) else ValueError(str(error))
        else:
            if record is not None:
                yield record


def _in_directory(path: Path) -> Path:
    return path if path.suffix == Path(FILE_NAME).suffix or path.is_file() else path / FILE_NAME


def _whole_lines(path: Path) -> bytes:
    text = path.read_bytes()
    return text[: text.rfind(b"\n") + 1]


def _sampled_steps(lines: Iterable[bytes]) -> list[int]:
    return sorted({record.step for record in _parse(lines) if isinstance(record, PlaceRecord)})


def _is_kept(line: bytes, sampled: set[int]) -> bool:
    """Whether a line stays when only these sampled steps do: what is not of a sampled step always stays."""
    for record in _parse([line]):
        if isinstance(record, PlaceRecord):
            return record.step in sampled
        if isinstance(record, StepRecord):
            return record.step in sampled or record.skipped or bool(record.metrics)
        return not isinstance(record, ValueError)
    return False
