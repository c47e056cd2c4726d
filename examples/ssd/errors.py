"""Errors that the user can do something about, and how a script ends on them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

BAD_INPUT = 2


class InputError(Exception):
    """What the user gave can't be used. The message is one sentence: what is wrong and what to do."""


def ends_cleanly(main: Callable[P, int]) -> Callable[P, int]:
    """Turn an `InputError` out of a script's main function into its sentence on stderr and status 2."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr, flush=True)
            return 130

    return wrapper
