"""The wheel and the sdist: what is in them, and what works where one is installed."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CHAINER_STEP = """
import ada_loss.chainer as ada
import chainer, numpy as np
with chainer.using_config("dtype", chainer.mixed16):
    model = ada.AdaLossScaled(chainer.Sequential(chainer.links.Linear(4, 3)))
optimizer = ada.prepare(chainer.optimizers.SGD(0.1).setup(model))
model.cleargrads()
(chainer.functions.sum(model(np.ones((2, 4), np.float16))) * 2.0**-20).backward()
optimizer.update()
assert optimizer.entry_scale.skipped == 0
gradient = model.true_gradients()["/0/W"]
assert (gradient == 2.0**-19).all(), gradient
"""

TORCH_STEP = """
import sys
sys.path.append({site!r})  # PyTorch's; all of ours comes from the wheel
import ada_loss.torch as ada, torch
assert ada.__file__.startswith(sys.prefix)
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
scaler = ada.GradScaler("cpu")
with torch.autocast("cpu", torch.float16):
    loss = model(torch.ones(2, 4)).float().sum() * 2.0**-20
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
assert (model.weight.grad == 2.0**-19).all(), model.weight.grad
"""


def build(directory: Path, kind: str) -> Path:
    """Build a distribution of the files that git knows, with the setuptools that is installed."""
    source, result = directory / "source", directory / kind
    result.mkdir()
    if not source.exists():
        source.mkdir()
        tracked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(tracked, cwd=ROOT, check=True, capture_output=True).stdout.split(b"\0")
        for name in filter(None, map(os.fsdecode, files)):
            if (ROOT / name).is_file() and not name.startswith(("results/", ".venv")):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(result)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = result.iterdir()
    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distribution")


@pytest.fixture(scope="module")
def wheel(directory: Path) -> Path:
    return build(directory, "wheel")


@pytest.fixture(scope="module")
def sdist(directory: Path) -> Path:
    return build(directory, "sdist")


def test_the_wheel_holds_the_package_its_types_and_its_requirements(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ada_loss", f"ada_loss-{wheel.name.split('-')[1]}.dist-info"}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ada_loss").rglob("*.py")}
    expected |= {f"ada_loss/requirements/{path.name}" for path in ROOT.glob("ada_loss/requirements/*.txt")}
    assert expected | {"ada_loss/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_metadata_are_complete(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert metadata["Summary"] and metadata["Keywords"] and metadata.get_payload().startswith("# ada_loss")
    bare = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert [each.split("<")[0].split(">")[0] for each in bare] == ["numpy"]
    extras = {"chainer", "cuda12", "cuda13", "example", "mpi", "mpich", "report", "torch"}
    assert extras <= set(metadata.get_all("Provides-Extra"))


def test_the_sdist_holds_all_that_a_wheel_is_built_from(sdist: Path) -> None:
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names
    assert {
        f"ada_loss/requirements/{path.name}" for path in ROOT.glob("ada_loss/requirements/*.txt")
    } <= names


class Environment:
    """A virtual environment with nothing but pip, whose pip keeps no cache."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=True)
        self.python, self.path = path / "bin" / "python", path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        variables = kept | {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        # Away from the checkout, whose package would be found first.
        return subprocess.run(
            [str(self.python), *arguments], cwd=self.path, env=variables, capture_output=True, text=True
        )

    def succeed(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def environment(directory: Path, wheel: Path) -> Environment:
    made = Environment(directory / "environment")
    made.succeed("-m", "pip", "install", str(wheel))
    return made


@pytest.mark.slow
class TestInACleanEnvironment:
    def test_1_the_wheel_brings_numpy_alone(self, environment: Environment) -> None:
        installed = environment.succeed("-m", "pip", "list", "--format", "freeze").split()
        names = {line.partition("=")[0] for line in installed}
        assert names <= {"ada-loss", "ada_loss", "numpy", "pip", "setuptools"}
        environment.succeed("-c", "import ada_loss.core.policy, ada_loss.arrays.measuring")

    def test_2_without_chainer_the_import_says_how_to_get_it(self, environment: Environment) -> None:
        failed = environment.run("-c", "import ada_loss.chainer")
        assert "python -m ada_loss.install chainer" in failed.stderr.splitlines()[-1]

    def test_3_without_pytorch_too(self, environment: Environment) -> None:
        failed = environment.run("-c", "import ada_loss.torch")
        assert 'pip install "ada-loss[torch]"' in failed.stderr.splitlines()[-1]

    def test_4_an_unknown_group_gets_a_sentence(self, environment: Environment) -> None:
        failed = environment.run("-m", "ada_loss.install", "chianer")
        assert failed.returncode == 2
        assert failed.stderr.startswith("ada_loss.install: There is no group chianer; choose from chainer,")

    def test_5_with_pytorch_a_step_is_made(self, environment: Environment) -> None:
        torch = pytest.importorskip("torch")
        site = str(Path(torch.__file__).parents[1])
        environment.succeed("-c", TORCH_STEP.format(site=site))

    def test_6_one_line_installs_chainer_and_a_step_is_made(self, environment: Environment) -> None:
        environment.succeed("-m", "ada_loss.install", "chainer")
        environment.succeed("-c", CHAINER_STEP)
        environment.succeed("-m", "pip", "check")


@pytest.mark.slow
def test_the_sdist_installs(directory: Path, sdist: Path) -> None:
    made = Environment(directory / "from sdist")
    made.succeed("-m", "pip", "install", str(sdist))
    made.succeed("-c", "import ada_loss.core.policy")
