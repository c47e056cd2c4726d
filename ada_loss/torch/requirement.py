"""Says which PyTorch is needed, before anything needs it."""

from __future__ import annotations

OLDEST, NEWEST = (2, 8), (2, 14)
"""Versions of PyTorch, the first and the last that the tests have run with."""

try:
    import torch
except ImportError as error:
    raise ImportError(
        'ada_loss.torch needs PyTorch, which is not installed: pip install "ada-loss[torch]".'
    ) from error


def check(version: str) -> None:
    """Refuse a version of PyTorch that is not in the range.

    Raises:
        ImportError: it is not.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ImportError(f"ada_loss.torch needs PyTorch {oldest} to {newest}, not {version}.")


check(torch.__version__)
