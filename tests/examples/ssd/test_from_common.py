"""The example is whole with nothing but its own folder on the path."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import EXAMPLE, ROOT


def run_alone(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train_multi.py", "predict.py", "evaluate.py", "demo.py"])
def test_scripts_start_from_anywhere(script):
    result = run_alone(str(EXAMPLE / script), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_every_shared_module_can_be_imported_first():
    names = sorted(path.stem for path in (EXAMPLE.parent / "common").glob("*.py"))
    assert names, "there are shared modules"
    for name in names:
        program = (
            f"import ada_loss.chainer, sys; sys.path.insert(0, {str(EXAMPLE)!r}); import {name} as module; "
        )
        result = run_alone("-c", program + "print(module.__file__)")
        assert result.stdout.strip() == str(EXAMPLE.parent / "common" / f"{name}.py"), result.stderr
