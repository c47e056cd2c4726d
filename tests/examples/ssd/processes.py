"""Runs scripts of the example in processes of their own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "ssd"


def run_script(
    name: str, *args: object, ranks: int | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the example, on several MPI ranks if asked to, with `extra` environment variables."""
    command = [*launcher(ranks), sys.executable, name, *map(str, args)]
    return subprocess.run(
        command, cwd=EXAMPLE, env=environment(**extra), capture_output=True, text=True, timeout=300
    )


def launcher(ranks: int | None) -> list[str]:
    """How to start so many ranks: the mpiexec beside this Python, or else the one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return [] if ranks is None else [str(beside if beside.exists() else "mpiexec"), "-n", str(ranks)]


def environment(**extra: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(EXAMPLE), str(EXAMPLE.parent / "common")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | extra
