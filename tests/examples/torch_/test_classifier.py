"""examples/torch: the classifier trains with every scaler, in one process and in two."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from example_scripts import EXAMPLES, ROOT, assert_one_sentence, run

pytest.importorskip("torch", reason='PyTorch is not installed: pip install "ada-loss[torch]"')

SCRIPT = EXAMPLES / "torch" / "classifier.py"


def assert_trained(finished):
    assert finished.returncode == 0, finished.stderr
    # One process tells, however many there are.
    (accuracy,) = re.findall(r"accuracy (\S+) on test images", finished.stdout)
    assert float(accuracy) > 0.9


@pytest.mark.parametrize("scaler", ["none", "torch", "ada"])
def test_trains(scaler):
    assert_trained(run(SCRIPT, "--epoch", 3, "--scaler", scaler))


@pytest.mark.parametrize("scaler", ["none", "torch", "ada"])
def test_trains_in_two_processes(scaler):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert_trained(
        subprocess.run(
            [*command, SCRIPT.name, "--epoch", "3", "--scaler", scaler],
            cwd=SCRIPT.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    )


def test_bad_input_is_one_sentence():
    assert_one_sentence(run(SCRIPT, "--epoch", "0"), "--epoch", "at least 1")
