"""The folder that a run writes: it is made, holds no other run, and two runs never write it at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from arguments import Settings
from checkpoints import FOLDER
from errors import InputError
from files import locked
from ranks import Alone
from reporting import LOG_FILE

RESULT_FILE = "result.json"
LOCK_FILE = ".lock"


@contextmanager
def reserved(settings: Settings, ranks: Alone) -> Iterator[None]:
    """In this block `--out` exists and only these ranks write there. All ranks enter it.

    Raises InputError on all of them if another process is in such a block, or an earlier run would be
    overwritten.
    """
    with ExitStack() as held:

        def enter() -> None:
            make_folder(settings.out)
            if ranks.rank == 0:
                held.enter_context(alone_in(settings.out))
            # Under the lock, or two runs might both find the folder empty.
            _check_no_other_run(settings)

        ranks.together(enter)
        yield


def make_folder(out: Path) -> None:
    """Make a folder that --out names. Raises InputError if that can't be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} can't be made ({error.strerror}): name another folder with --out.") from None


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """In this block no other process is in such a block for this folder; an InputError if one is."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / LOCK_FILE))
        except BlockingIOError:
            raise InputError(
                f"Another run is writing to {out} now: wait for its end, or write to another folder."
            ) from None
        except OSError as error:
            raise InputError(
                f"{out} can't be written to ({error.strerror}): name another folder with --out."
            ) from None
        yield


def _check_no_other_run(settings: Settings) -> None:
    """Leave the files of an earlier run alone, unless this one goes on with it."""
    out = settings.out
    found = [name for name in (RESULT_FILE, LOG_FILE, FOLDER) if (out / name).exists()]
    goes_on = settings.resume == "auto" or (
        settings.resume is not None
        and out.resolve() in [Path(settings.resume).resolve(), *Path(settings.resume).resolve().parents]
    )
    if found and not goes_on:
        raise InputError(
            f"{out} holds an earlier run ({found[0]}): name another folder with --out, or go on with that "
            "run with --resume auto."
        )
