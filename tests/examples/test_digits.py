"""examples/digits: the first example trains as its page says."""

from __future__ import annotations

import re

import pytest

from example_scripts import EXAMPLES, assert_one_sentence, run

SCRIPT = EXAMPLES / "digits" / "train.py"


@pytest.mark.parametrize("dtype", ["mixed16", "float32"])
def test_trains(tmp_path, dtype):
    finished = run(SCRIPT, "--epoch", 2, "--dtype", dtype, "--out", tmp_path)
    assert finished.returncode == 0, finished.stderr
    accuracy = float(re.search(r"accuracy (\S+) on test images, 0 steps skipped", finished.stdout)[1])
    assert accuracy > 0.85
    assert "conv2" in finished.stdout


def test_its_page_shows_the_two_lines_of_the_script():
    page, script = (SCRIPT.with_name(name).read_text() for name in ("README.md", "train.py"))
    lines = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert len(lines) == 2 and set(lines) <= {line.strip() for line in script.splitlines()}
    assert len(script.splitlines()) <= 110


def test_bad_input_is_one_sentence(tmp_path):
    assert_one_sentence(run(SCRIPT, "--epoch", "0", "--out", tmp_path), "--epoch", "at least 1")
