"""Installed packages with the names of the examples' modules are not taken for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAMS = [
    "benchmarks/data.py",
    "benchmarks/step_time.py",
    "examples/ssd/train_multi.py",
    "results/make_results.py",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_installed_package_called_datasets_breaks_nothing(program: str, tmp_path: Path) -> None:
    for name in ("datasets", "models", "loss", "training", "threads"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is the installed one')")
    # Installed packages are found at the end of the path.
    code = (
        "import runpy, sys; "
        f"sys.path.append({str(tmp_path)!r}); sys.path[0] = {str((ROOT / program).parent)!r}; "
        f"sys.argv = [{program!r}, '--help']; runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
