"""Writing files so that a reader, or a restart, never finds half of one, and two writers never meet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:
    # Not on Windows, where nothing is locked.
    fcntl = None


def write_whole(path: Path, content: str) -> None:
    """Write a text file; one of that name stays as it was until the new one is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(content)
        flush_to_disk(file)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of this block: BlockingIOError if one of them is in it already.

    The file is there only as long as the block runs. One that a killed process left keeps nobody out, since
    the system took the lock back. Where files can't be locked, nobody is kept out.
    """
    if fcntl is None:
        yield
        return
    file = _open_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            # A file system without locks.
            return file
        if _is_at(path, file):
            return file
        # Whoever held it has deleted it since it was opened here.
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
