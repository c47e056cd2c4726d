"""Folders of images: stand-in sets that are written once, whole or not at all, and files that are none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import InputError


def made_once(folder: Path, write: Callable[[Path], None], option: str) -> Path:
    """A folder that `write` filled, now or before; several processes may ask at once, and one is heard.

    Raises InputError if it can't be written, and names the option that chooses another.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error.strerror}): use {option}.") from None
    try:
        write(working)
        os.chmod(working, 0o755)
        os.rename(working, folder)
    except OSError as error:
        if not folder.is_dir():
            raise InputError(f"{folder} can't be written ({error.strerror}): use {option}.") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder


def read_sample(images: Any, index: int, paths: Callable[[], str]) -> tuple[Any, ...]:
    """A sample of a data set of ChainerCV; raises InputError with its `paths` if a file is no image."""
    try:
        return images[index]
    # ChainerCV looks at what OpenCV gives for a file that it can't read: None.
    except (OSError, AttributeError, ValueError) as error:
        raise InputError(f"{paths()} can't be read ({error}): mend it, or take it out of its list.") from None
