"""Setting up from nothing: what is (re)made when, what is said when it cannot be, and what setup.py reads."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bootstrap() -> ModuleType:
    return load(ROOT / "tools" / "bootstrap.py")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load(ROOT / "setup.py")


class Checkout:
    """A copy of what the bootstrap reads; what it would do to .venv is noted instead of done."""

    def __init__(self, bootstrap: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.bootstrap = root, bootstrap
        self.done: list[str] = []
        shutil.copytree(ROOT / "ada_loss" / "requirements", root / "ada_loss" / "requirements")
        (root / "tools").mkdir()
        for path in bootstrap.input_files():
            shutil.copy(path, root / path.relative_to(ROOT))
        self.python = root / ".venv" / "bin" / "python"
        locations = {
            "ROOT": root,
            "REQUIREMENTS": root / "ada_loss" / "requirements",
            "VENV": root / ".venv",
            "PYTHON": self.python,
            "STAMP": root / ".venv" / "bootstrap.json",
            "LOG": root / ".venv" / "bootstrap.log",
        }
        for name, value in locations.items():
            monkeypatch.setattr(bootstrap, name, value)
        monkeypatch.setattr(bootstrap, "run", self.run)

    def run(self, step: str, arguments: list[str], remedy: str, python: str = "") -> None:
        self.done.append(step)
        if step == "making .venv":
            self.put_python()

    def put_python(self) -> None:
        self.python.parent.mkdir(parents=True, exist_ok=True)
        self.python.symlink_to(sys.executable)

    def set_up(self, *groups: str) -> list[str]:
        self.done = []
        self.bootstrap.set_up(set(groups))
        return self.done


FILES = "ada_loss/requirements"
INSTALL = [
    "installing pip",
    "installing the requirements",
    "installing ada_loss",
    "importing what was installed",
]
REMAKE = ["making .venv", *INSTALL]


@pytest.fixture
def checkout(bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    return Checkout(bootstrap, tmp_path, monkeypatch)


def test_set_up_makes_the_environment_once(checkout: Checkout) -> None:
    assert checkout.set_up() == REMAKE
    assert checkout.set_up() == []


@pytest.mark.parametrize(
    "name", [f"{FILES}/base.txt", f"{FILES}/torch.txt", f"{FILES}/build-constraints.txt", "setup.py"]
)
def test_changed_input_updates_the_environment_in_place(checkout: Checkout, name: str) -> None:
    checkout.set_up()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.set_up() == INSTALL
    assert checkout.set_up() == []


def test_group_stays_wanted_once_it_was_asked_for(checkout: Checkout) -> None:
    checkout.set_up()
    assert checkout.set_up("torch") == INSTALL
    assert checkout.set_up() == []


def test_interrupted_set_up_starts_over(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(step: str, *rest: object) -> None:
        checkout.run(step, [], "")
        if step == "installing the requirements":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkout.bootstrap, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkout.set_up()
    assert checkout.set_up() == REMAKE


@pytest.mark.parametrize("key", ["version", "base_prefix"])
def test_change_of_python_starts_over(checkout: Checkout, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.set_up()
    monkeypatch.setattr(sys, key, getattr(sys, key) + " ")
    assert checkout.set_up() == REMAKE


def test_environment_whose_python_is_gone_is_made_again(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.python.unlink()
    checkout.python.symlink_to(checkout.root / "gone")
    assert checkout.set_up() == REMAKE


def test_damaged_stamp_is_no_obstacle(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.bootstrap.STAMP.write_text('{"python": ')
    assert checkout.set_up()[-4:] == INSTALL
    assert checkout.set_up() == []


def test_environment_of_somebody_else_is_used_and_never_deleted(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.put_python()
    treasure = checkout.root / ".venv" / "treasure"
    treasure.touch()
    assert "making .venv" not in checkout.set_up()
    assert checkout.set_up() == []
    monkeypatch.setattr(sys, "version", "another")
    with pytest.raises(checkout.bootstrap.Failure, match="made by somebody else and with another Python"):
        checkout.set_up()
    assert treasure.exists()


def test_file_in_the_place_of_the_environment_ends_with_a_sentence(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout.root / ".venv").write_text("precious")
    assert checkout.bootstrap.main([]) == 2
    assert re.fullmatch(r"bootstrap: .*\.venv.*try again\.\n", capsys.readouterr().err)
    assert (checkout.root / ".venv").read_text() == "precious"


def test_unknown_group_is_named_with_the_choices(checkout: Checkout) -> None:
    with pytest.raises(checkout.bootstrap.Failure, match="no group tensorflow; choose from base, .*torch"):
        checkout.bootstrap.check_groups({"tensorflow"}, checkout.bootstrap.available_groups())


def test_rival_groups_exclude_each_other_also_over_two_runs(checkout: Checkout) -> None:
    checkout.set_up("cuda12")
    with pytest.raises(checkout.bootstrap.Failure, match="exclude each other"):
        checkout.set_up("cuda13")


def test_digest_depends_on_names_and_contents(bootstrap: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("yz")
    before = bootstrap.digest([first, second])
    assert bootstrap.digest([first, second]) == before
    assert bootstrap.digest([second, first]) != before
    first.write_text("xy")
    second.write_text("z")
    assert bootstrap.digest([first, second]) != before


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 9), (3, 14), (4, 0)])
def test_unsupported_python_gets_one_sentence(bootstrap: ModuleType, version: tuple[int, int]) -> None:
    assert not bootstrap.is_supported(version)
    sentence = bootstrap.unsuitable_python(version, "/usr/bin/python3")
    assert "needs CPython 3.10 to 3.13" in sentence
    assert "/usr/bin/python3 is Python {}.{}".format(*version) in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_supported_python_without_venv_gets_another(bootstrap: ModuleType) -> None:
    assert bootstrap.is_supported(sys.version_info[:2])
    assert "apt install python3.12-venv" in bootstrap.unsuitable_python((3, 12), "/usr/bin/python3")


def test_supported_versions_are_those_that_the_package_declares(bootstrap: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    oldest, newest = bootstrap.SUPPORTED[-1], bootstrap.SUPPORTED[0]
    declared = f'requires-python = ">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"'
    assert declared in text
    classified = re.findall(r"Python :: (\d+)\.(\d+)", text)
    assert {(int(major), int(minor)) for major, minor in classified} == set(bootstrap.SUPPORTED)


def test_without_a_suitable_python_on_path_it_ends_with_the_sentence_and_status_2(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    assert bootstrap.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"bootstrap: {bootstrap.unsuitable_python((3, 9), sys.executable)}\n"


def put_script(directory: Path, name: str, script: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_an_unsuitable_python_that_was_chosen_is_refused(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    put_script(tmp_path, "python3.12", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    assert bootstrap.main(["--chosen"]) == 2
    assert "is Python 3.9; name another: make setup PYTHON=" in capsys.readouterr().err


def test_a_python_that_was_chosen_stays_chosen(checkout: Checkout, tmp_path: Path) -> None:
    python = put_script(tmp_path, "another", f'echo "$@" > "{tmp_path}/arguments"; exit 7')
    checkout.set_up()
    stamp = checkout.bootstrap.read_stamp()
    checkout.bootstrap.write_stamp(dict(stamp, chosen=str(python)))
    assert checkout.bootstrap.main(["torch"]) == 7
    script = ROOT / "tools" / "bootstrap.py"
    assert (tmp_path / "arguments").read_text() == f"{script} --chosen torch\n"


def test_a_python_that_was_chosen_and_is_gone_is_forgotten(checkout: Checkout, tmp_path: Path) -> None:
    checkout.set_up()
    checkout.bootstrap.write_stamp(dict(checkout.bootstrap.read_stamp(), chosen=str(tmp_path / "gone")))
    checkout.done = []
    assert checkout.bootstrap.main([]) == 0
    assert checkout.done == []


def test_choosing_the_python_that_is_used_already_is_only_noted(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.done = []
    assert checkout.bootstrap.main(["--chosen"]) == 0
    assert checkout.done == []
    assert checkout.bootstrap.read_stamp()["chosen"] == checkout.bootstrap.base_python()
    assert checkout.bootstrap.main([]) == 0
    assert checkout.bootstrap.read_stamp()["chosen"] == checkout.bootstrap.base_python()


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), ""), (("PYTHON=python3.12",), "--chosen")], ids=["not", "named"]
)
def test_make_says_whether_a_python_was_named(arguments: tuple[str, ...], expected: str) -> None:
    inherited = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "GROUPS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    said = subprocess.run(
        ["make", "-n", "setup", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    python = "python3.12" if arguments else "python3"
    assert said.stdout.split() == [python, "tools/bootstrap.py", *([expected] if expected else [])]


def test_unsuitable_python_hands_over_to_a_working_one_on_path(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_script(tmp_path, "python3.13", "exit 127")
    told = tmp_path / "arguments"
    put_script(tmp_path, "python3.11", f'[ "$1" = -c ] || echo "$@" > "{told}"; [ "$1" = -c ] || exit 7')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    assert bootstrap.main(["torch"]) == 7
    assert (tmp_path / "arguments").read_text() == f"{ROOT / 'tools' / 'bootstrap.py'} torch\n"


def test_failing_step_names_the_error_and_the_remedy(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / "log")
    (tmp_path / "log").write_text("ERROR: of an earlier run\n")
    code = "import sys; print('ERROR: No matching distribution.'); print('bye'); sys.exit(1)"
    with pytest.raises(bootstrap.Failure) as caught:
        bootstrap.run("installing", ["-c", code], "check the network", sys.executable)
    assert str(caught.value) == (
        "installing failed (ERROR: No matching distribution); check the network, then try again"
        f" (log: {tmp_path / 'log'})."
    )


def test_steps_run_without_settings_that_lead_away_from_the_environment(bootstrap: ModuleType) -> None:
    given = {"PYTHONPATH": "x", "PIP_TARGET": "x", "PIP_USER": "1", "PIP_INDEX_URL": "kept", "HOME": "kept"}
    assert bootstrap.clean_environment(given) == {"PIP_USER": "0", "PIP_INDEX_URL": "kept", "HOME": "kept"}


def test_python_3_6_can_parse_the_script_to_say_that_it_is_too_old() -> None:
    ast.parse((ROOT / "tools" / "bootstrap.py").read_text(), feature_version=(3, 6))


def test_setup_drops_comments_and_options_for_pip(setup: ModuleType) -> None:
    text = """
    # why
    plain>=1.2,<3  # because
    frozen==0.1 --config-settings="--build-option=--skip-build" --config-settings="x=y"
    marked==1; python_version < "3.11"
    -r other.txt
    --no-binary plain
    """
    assert setup.requirements(text) == ["plain>=1.2,<3", "frozen==0.1", 'marked==1; python_version < "3.11"']


def test_setup_reads_every_group_as_valid_requirements(setup: ModuleType, bootstrap: ModuleType) -> None:
    from packaging.requirements import Requirement

    groups = setup.read_all()
    assert set(groups) - setup.NOT_EXTRAS == bootstrap.available_groups() - {"base"}
    names = {name: [Requirement(line).name for line in lines] for name, lines in groups.items()}
    assert names["base"] == ["numpy"]
    assert "chainer" in names["chainer"] and "chainercv" in names["example"] and names["mpi"] == ["mpi4py"]
    assert all(names.values())
