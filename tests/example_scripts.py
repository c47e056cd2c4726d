"""Runs scripts of the examples in processes of their own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(
    script: Path, *args: object, ranks: int | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in its folder, on several MPI ranks if asked to, with `extra` environment variables."""
    command = [*launcher(ranks), sys.executable, script.name, *map(str, args)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | threads | extra
    return subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=300
    )


def launcher(ranks: int | None) -> list[str]:
    """How to start so many ranks: the mpiexec beside this Python, or else the one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return [] if ranks is None else [str(beside if beside.exists() else "mpiexec"), "-n", str(ranks)]


def assert_one_sentence(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    """The script ended on bad input: status 2, one line that says what is wrong, no traceback."""
    lines = finished.stderr.strip().splitlines()
    assert finished.returncode == 2, finished.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
    for word in words:
        assert word in lines[0]
