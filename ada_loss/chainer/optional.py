"""Entries of a snapshot that may be missing."""

from __future__ import annotations

from typing import Any


def load_optional(serializer: Any, key: str) -> Any:
    """The array that a deserializer holds under a key; None where it holds none, as in files of plain
    models."""
    try:
        return serializer(key, None)
    except (KeyError, ValueError):
        # The npz deserializer has no such key, the HDF5 one not even the group above it.
        return None
