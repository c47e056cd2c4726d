"""The example is whole with nothing but its own folder on the path."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import EXAMPLE, ROOT

IMPORT_EACH_FIRST = """
import importlib, sys
from pathlib import Path
import ada_loss.chainer
example = Path(sys.argv[1])
before, path = set(sys.modules), [str(example), *sys.path]
for name in sorted(file.stem for file in example.glob("*.py")):
    sys.path[:] = path
    found = importlib.import_module(name)
    for module in set(sys.modules) - before:
        if str(example.parent) in (getattr(sys.modules[module], "__file__", None) or ""):
            del sys.modules[module]
    print(name)
"""


def run_alone(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train_multi.py", "predict.py", "evaluate.py", "demo.py"])
def test_scripts_start_from_anywhere(script):
    result = run_alone(str(EXAMPLE / script), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_every_module_can_be_imported_first():
    result = run_alone("-c", IMPORT_EACH_FIRST, str(EXAMPLE))
    assert result.returncode == 0, result.stderr
    assert {"errors", "data_voc", "train_multi"} <= set(result.stdout.split())
