"""Programs leave half of the cores to others, unless they are told how many threads to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = Path(__file__).resolve().parents[2] / "examples" / "common"

CODE = """
import sys
sys.path.insert(0, {common!r})
import numpy, threads, os
threads.usable_cores = lambda: {cores}
threads.use_half_of_the_cores()
from threadpoolctl import threadpool_info
print(os.environ["OMP_NUM_THREADS"], *{{each["num_threads"] for each in threadpool_info()}})
"""


def said(cores: int, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    code = CODE.format(common=str(COMMON), cores=cores)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1)])
def test_half_of_the_cores_compute(cores: int, threads: int) -> None:
    assert said(cores) == [str(threads), str(threads)]


def test_what_the_environment_says_stays() -> None:
    assert said(2, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")[0] == "2"
