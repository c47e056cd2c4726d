"""Errors that the user can do something about, and how a script ends on them."""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 3, 130
# What the system says where a disk, or a user's share of it, is full.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# How launchers (MPICH and its relatives, Open MPI, MVAPICH) tell a process its rank.
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


class InputError(Exception):
    """What the user gave can't be used. The message is one sentence: what is wrong and what to do."""


class SharedInputError(InputError):
    """An error that all ranks have, such as one on the command line: rank 0 says it for all."""


def as_input_error(error: BaseException) -> InputError | None:
    """The error as one that the user can do something about: so are those of the system that name a file, or
    say that there is no room left. None if it is of another kind."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_ROOM):
        what = "A file" if error.filename is None else error.filename
        return InputError(
            f"{what} can't be read or written ({reason(error)}): mend that, or name another one."
        )
    return None


def ends_cleanly(main: Callable[P, int]) -> Callable[P, int]:
    """Turn an `InputError`, or what `as_input_error` makes one, out of a script's main function into its
    sentence on stderr and status 2."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files may be bytes that are no text.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except (InputError, OSError) as caught:
            error = as_input_error(caught)
            if error is None:
                raise
            if launched_rank() == 0 or not isinstance(error, SharedInputError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            return BAD_INPUT
        except KeyboardInterrupt:
            say_interrupted()
            return INTERRUPTED

    return wrapper


def say_interrupted() -> None:
    if launched_rank() == 0:
        print("\ninterrupted", file=sys.stderr, flush=True)


def launched_rank() -> int:
    """This process's number among those that an MPI launcher started, 0 without one; needs no MPI."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def caution(sentence: str) -> None:
    """Say something that is worth knowing, once for all ranks that see it."""
    if launched_rank() == 0:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """What an error says, for the brackets of a sentence: in one line, without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
