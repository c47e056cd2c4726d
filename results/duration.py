"""How long runs will take, by a trial of a few iterations on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from arguments import Settings

# Rows of the trial's log; the first one is slow, since everything is new, and the last one has an evaluation.
ROWS, INTERVAL = 3, 8


def seconds_of(runs: Sequence[Settings], jobs: int, start: Callable[[Sequence[str]], None]) -> float:
    """About how long these runs take, `jobs` of them at a time.

    Args:
        runs: what is to be trained.
        jobs: how many at a time.
        start: trains with some more options.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial = ("--iteration", str(ROWS * INTERVAL), "--log-interval", str(INTERVAL), "--step")
        start((*trial, "--out", str(Path(folder) / "run")))
        rows = json.loads((Path(folder) / "run" / "log.json").read_text(encoding="utf-8"))
        settings = json.loads((Path(folder) / "run" / "result.json").read_text(encoding="utf-8"))["settings"]
    seconds = (rows[1]["elapsed_time"] - rows[0]["elapsed_time"]) / (INTERVAL * settings["batchsize"])
    return seconds * sum(run.iteration * run.batchsize for run in runs) / jobs


def in_words(seconds: float) -> str:
    """A duration to a minute, or to six minutes if it takes hours."""
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
