"""Entries of a snapshot that may be missing."""

from __future__ import annotations

from typing import Any


def load_optional(serializer: Any, key: str) -> Any:
    """The array that a deserializer holds under a key; None where it holds none, as in files of plain
    models."""
    # The HDF5 deserializer of a group that is not there has None in its place.
    if getattr(serializer, "group", serializer) is None:
        return None
    try:
        return serializer(key, None)
    except KeyError:
        return None
