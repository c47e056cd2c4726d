"""Writing files so that a reader, or a restart, never finds half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
