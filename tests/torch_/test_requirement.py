"""What `import ada_loss.torch` asks for, and what it leaves alone."""

import subprocess
import sys

import pytest

from ada_loss.torch.requirement import NEWEST, OLDEST, check

WITHOUT = """
import sys
sys.modules["{missing}"] = None
import ada_loss.torch
"""


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_without_pytorch_one_sentence_says_how_to_get_it():
    result = run(WITHOUT.format(missing="torch"))
    assert result.returncode
    assert result.stderr.splitlines()[-1] == (
        'ImportError: ada_loss.torch needs PyTorch, which is not installed: pip install "ada-loss[torch]".'
    )


def test_it_works_without_chainer():
    result = run(WITHOUT.format(missing="chainer"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_versions_within_the_range_are_taken(version):
    check("{}.{}.1+cu128".format(*version))


@pytest.mark.parametrize("version", [(1, 13), (OLDEST[0], OLDEST[1] - 1), (NEWEST[0], NEWEST[1] + 1), (3, 0)])
def test_other_versions_are_refused(version):
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.\d+ to 2\.\d+, not {}\.{}\.0".format(*version)):
        check("{}.{}.0".format(*version))
