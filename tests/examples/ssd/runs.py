"""Training runs in this process, and what they leave in their folders, read and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import train_multi
from batches import Schedule

# Of the paths in a checkpoint, those that hold seconds.
TIMED = {"extensions/LogReport/_log", "_snapshot_elapsed_time"}
BRIEF = ("--device", "cpu", "--kernels", "numpy", "--batchsize", "2", "--log-interval", "1", "--warm-up", "0")


def train(digits: Path, out: Path, *args: object) -> int:
    return train_multi.main([*BRIEF, "--dataset-dir", str(digits), "--out", str(out), *map(str, args)])


def status_of(digits: Path, out: Path, *args: object) -> int:
    try:
        return train(digits, out, *args)
    except SystemExit as end:
        return end.code


def assert_one_sentence(capsys, words: str) -> None:
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.err.rstrip().endswith(".")
    assert words in printed.err
    assert "Traceback" not in printed.out + printed.err


def meanwhile(act: Callable[[], object], after: int) -> Callable[[Schedule, int], list[tuple[int, int]]]:
    """A `Schedule.share` for a run in which something happens after so many iterations."""
    share = Schedule.share

    def interrupted(schedule: Schedule, iteration: int) -> list[tuple[int, int]]:
        if iteration == after:
            act()
        return share(schedule, iteration)

    return interrupted


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "model.npz") as file:
        return dict(file)


def rows_without_times(out: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.endswith("time") and name != "time_left"}
        for row in read(out / "log.json")
    ]


def assert_same_weights(first: Path, second: Path) -> None:
    assert_same_arrays(weights(first), weights(second))


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs end with the same weights, log and newest checkpoint: masters, momenta, scales, counters."""
    assert_same_weights(first, second)
    assert rows_without_times(first) == rows_without_times(second)
    newest = [max((out / "checkpoints").glob("iteration-*")) for out in (first, second)]
    assert newest[0].name == newest[1].name
    files = [sorted(path.name for path in folder.glob("rank-*.npz")) for folder in newest]
    assert files[0] == files[1]
    assert "rank-0.npz" in files[0]
    for name in files[0]:
        assert_same_arrays(*(_without_times(folder / name) for folder in newest))


def _without_times(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name not in TIMED}
