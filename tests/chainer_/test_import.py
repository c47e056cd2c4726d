"""What importing `ada_loss.chainer` does, and what the first scaled model does."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLAIN = """
import ada_loss.chainer as ada
import chainer, chainer.functions as F, chainer.links as L
import numpy as np
from chainer import _backprop, function_node
from chainer.functions.connection.linear import LinearFunction

before = _backprop._backprop_to_all, function_node.grad, chainer.grad, LinearFunction.forward
forward = L.Linear(300, 50)
x = np.random.default_rng(0).standard_normal((8, 300)).astype(np.float16)

def results():
    return _backprop._backprop_to_all, function_node.grad, chainer.grad, LinearFunction.forward
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", PLAIN + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_runs(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_of_chainers() -> None:
    assert_runs("""
assert _backprop._backprop_to_all.__module__ == "chainer._backprop"
assert chainer.grad.__module__ == function_node.grad.__module__ == "chainer.function_node"
assert LinearFunction.forward.__module__ == "chainer.functions.connection.linear"
assert not hasattr(LinearFunction.forward, "__wrapped__")
assert ada.kernels.current() == "chainer"
""")


def test_the_first_scaled_model_installs_engine_and_kernels() -> None:
    assert_runs("""
ada.AdaLossScaled(L.Linear(3, 3))
assert all(new is not old for new, old in zip(results(), before))
assert ada.kernels.current() == "numpy"
""")


def test_a_scaled_model_from_a_pickle_installs_them_as_well(tmp_path) -> None:
    path = str(tmp_path / "model.pickle")
    assert_runs(f"""
import pickle
pickle.dump(ada.AdaLossScaled(L.Linear(3, 3)), open({path!r}, "wb"))
""")
    assert_runs(f"""
import pickle
model = pickle.load(open({path!r}, "rb"))
assert _backprop._backprop_to_all is not before[0]
assert ada.kernels.current() == "numpy"
""")


@pytest.mark.parametrize("provider", ["chainer", "numpy"])
def test_kernels_that_were_chosen_before_stay(provider: str) -> None:
    assert_runs(f"""
ada.kernels.use({provider!r})
ada.AdaLossScaled(L.Linear(3, 3))
assert ada.kernels.current() == {provider!r}
""")


def test_kernels_of_a_block_are_no_choice_for_the_process() -> None:
    assert_runs("""
with ada.kernels.using("chainer"):
    ada.AdaLossScaled(L.Linear(3, 3))
    assert ada.kernels.current() == "chainer"
assert ada.kernels.current() == "numpy"
""")


def test_neither_chainercv_nor_mpi_nor_pytorch_is_needed() -> None:
    assert_runs("""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("chainercv", "mpi4py", "torch", "cv2", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
model = ada.AdaLossScaled(chainer.Sequential(L.Linear(300, 3)))
optimizer = ada.prepare(chainer.optimizers.SGD().setup(model))
F.sum(model(x.astype(np.float32))).backward()
optimizer.update()
assert not {"chainercv", "mpi4py", "torch"} & set(sys.modules)
""")


def test_without_chainer_the_import_says_how_to_get_it() -> None:
    code = """
import sys
sys.modules["chainer"] = None
import ada_loss.chainer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ada_loss.chainer needs Chainer" in done.stderr
    assert "python -m ada_loss.install chainer" in done.stderr.splitlines()[-1]
