#!/usr/bin/env python3
"""Makes .venv, with everything that ada_loss, its example and its tests need.

    python3 tools/bootstrap.py [--chosen] [GROUP ...]

Needs a CPython with venv, and the network the first time. GROUP is the name of a file in
ada_loss/requirements/ that is wanted as well: torch, cuda12 or cuda13; it stays wanted in later runs. Returns
at once when nothing changed, updates .venv when the requirements changed, starts over after an interruption
or a change of Python. With --chosen it has to be this Python, which later runs without go on with; otherwise
another one from PATH may take over. Exit status 0 when .venv is ready, 2 with one sentence when it cannot be
made.

This file has to run on every Python from 3.6 on, far enough to say which ones are supported.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple

SUPPORTED = ((3, 13), (3, 12), (3, 11), (3, 10))
DEFAULT_GROUPS = {"base", "chainer", "mpi", "mpich", "example", "report", "dev"}
NOT_GROUPS = {"pip", "build-constraints", "constraints"}
RIVAL_GROUPS = {"cuda12", "cuda13"}

CHOSEN = "--chosen"

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "ada_loss" / "requirements"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bootstrap.json"
LOG = VENV / "bootstrap.log"

# Importing MPI loads its library, which need not be started for that.
SMOKE_TEST = """
import ada_loss.chainer.compat, chainer, chainercv, chainermn, mpi4py
import cv2, matplotlib.pyplot, sklearn.datasets
import hypothesis, pytest
mpi4py.rc.initialize = False
from mpi4py import MPI
"""


class Failure(Exception):
    """Its message is the sentence that the script ends with."""


def main(arguments: List[str]) -> int:
    chosen, groups = CHOSEN in arguments, [word for word in arguments if word != CHOSEN]
    try:
        suitable = is_supported(sys.version_info[:2]) and importlib.util.find_spec("ensurepip") is not None
        if chosen and not suitable:
            raise Failure(unsuitable_python(sys.version_info[:2], sys.executable, chosen=True))
        remembered = None if chosen else chosen_before()
        if remembered:
            return subprocess.call([remembered, str(Path(__file__).resolve()), CHOSEN] + groups)
        if not suitable:
            return hand_over(groups)
        with exclusive_access():
            set_up(check_groups(set(groups), available_groups()), chosen)
    except Failure as failure:
        print("bootstrap: {}".format(failure), file=sys.stderr)
        return 2
    except OSError as error:
        print("bootstrap: {}; see to that place, then try again.".format(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; the next run starts over.", file=sys.stderr)
        return 130
    return 0


def is_supported(version: Tuple[int, ...]) -> bool:
    return version in SUPPORTED


def hand_over(arguments: List[str]) -> int:
    """Let a suitable Python from PATH run this script in place of the present one; its exit status."""
    for version in SUPPORTED:
        python = shutil.which("python{}.{}".format(*version))
        if python and subprocess.call([python, "-c", "import ensurepip"], stderr=subprocess.DEVNULL) == 0:
            return subprocess.call([python, str(Path(__file__).resolve())] + arguments)
    raise Failure(unsuitable_python(sys.version_info[:2], sys.executable))


def base_python() -> str:
    """This Python, outside of any virtual environment: that one may be the very .venv."""
    return getattr(sys, "_base_executable", None) or sys.executable


def chosen_before() -> Optional[str]:
    """The Python that an earlier run was told to take, if it is there and not this one."""
    python = read_stamp().get("chosen")
    there = python and os.path.exists(python) and not os.path.samefile(python, base_python())
    return python if there else None


def unsuitable_python(version: Tuple[int, ...], executable: str, chosen: bool = False) -> str:
    """What is wrong with this Python, and what to do."""
    if is_supported(version):
        return (
            "{0} cannot make virtual environments; install its venv module"
            " (on Debian and Ubuntu: apt install python{1}.{2}-venv)."
        ).format(executable, *version)
    return (
        "ada_loss needs CPython {}.{} to {}.{}, {} is Python {}.{}{}: make setup PYTHON=/path/to/python3."
    ).format(
        *(SUPPORTED[-1] + SUPPORTED[0] + (executable,) + version),
        "; name another" if chosen else ", and PATH has no other; install one and name it",
    )


@contextlib.contextmanager
def exclusive_access() -> Iterator[None]:
    """Wait until no other run of this script works on the same .venv."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def available_groups() -> Set[str]:
    return {path.stem for path in REQUIREMENTS.glob("*.txt")} - NOT_GROUPS


def check_groups(groups: Set[str], available: Set[str]) -> Set[str]:
    unknown = sorted(groups - available)
    if unknown:
        raise Failure(
            "there is no group {}; choose from {}.".format(", ".join(unknown), ", ".join(sorted(available)))
        )
    if RIVAL_GROUPS <= groups:
        raise Failure("cuda12 and cuda13 exclude each other; choose one, and remove .venv to change to it.")
    return groups


def set_up(requested: Set[str], chosen: bool = False) -> None:
    stamp = read_stamp()
    groups = check_groups(DEFAULT_GROUPS | requested | set(stamp.get("groups", ())), available_groups())
    # Without a stamp somebody else made it, and may have more in it than we know.
    ours = stamp.get("ours", False) or not PYTHON.exists()
    home = {"python": sys.version, "prefix": sys.base_prefix, "root": str(ROOT)}
    earlier = stamp.get("chosen") if home.items() <= stamp.items() else None
    begun = dict(home, ours=ours, groups=sorted(groups), chosen=base_python() if chosen else earlier)
    ready = dict(begun, inputs=digest(input_files()))
    if dict(stamp, chosen=ready["chosen"]) == ready and PYTHON.exists():
        write_stamp(ready)
        return

    started = time.monotonic()
    version = "{}.{}".format(*sys.version_info)
    print("Setting up .venv with Python {}, about a minute the first time ...".format(version), flush=True)
    if not ours:
        adopt_environment()
    elif not PYTHON.exists() or "inputs" not in stamp or not home.items() <= stamp.items():
        make_environment(begun)
    write_stamp(begun)
    install(sorted(groups))
    write_stamp(ready)
    print("... ready in {:.0f} s.".format(time.monotonic() - started), flush=True)


def read_stamp() -> Dict[str, Any]:
    """What the last run left: without `inputs` it was interrupted; empty if there was none."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(stamp: Dict[str, Any]) -> None:
    draft = STAMP.with_suffix(".new")
    draft.write_text(json.dumps(stamp))
    draft.replace(STAMP)


def input_files() -> List[Path]:
    names = ["setup.py", "pyproject.toml", "tools/bootstrap.py"]
    return sorted(REQUIREMENTS.glob("*.txt")) + [ROOT / name for name in names]


def digest(files: Iterable[Path]) -> str:
    """One hash for the names and contents of the files."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def adopt_environment() -> None:
    """Prepare to install into a .venv that this script did not make, and so must not delete."""
    command = [str(PYTHON), "-c", "import sys; print(sys.version)"]
    if subprocess.run(command, stdout=subprocess.PIPE).stdout.decode().strip() != sys.version:
        raise Failure(
            "{} was made by somebody else and with another Python than {}; "
            "move it away or delete it, then try again.".format(VENV, sys.executable)
        )
    run("installing pip", ["-m", "ensurepip"], "delete .venv")


def make_environment(begun: Dict[str, Any]) -> None:
    """A fresh .venv in place of any older one, marked as ours from the first moment."""
    if VENV.exists():
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    write_stamp(begun)
    run("making .venv", ["-m", "venv", str(VENV)], "check the free disk space", base_python())


def install(groups: List[str]) -> None:
    def files(names: Iterable[str]) -> List[str]:
        return [word for name in names for word in ("-r", str(REQUIREMENTS / "{}.txt".format(name)))]

    # Compiling everything would take half of the time: the smoke test compiles what is really imported.
    pip = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
    constrained = pip + ["--build-constraint", str(REQUIREMENTS / "build-constraints.txt")]
    constrained += ["--constraint", str(REQUIREMENTS / "constraints.txt")]
    remedy = "check the network and the free disk space"
    run("installing pip", pip + ["--upgrade"] + files(["pip"]), remedy)
    run("installing the requirements", constrained + files(groups), remedy)
    # Its own build needs a setuptools that the others cannot be built with.
    run("installing ada_loss", pip + ["--no-deps", "-e", "."], remedy)
    run("importing what was installed", ["-c", SMOKE_TEST], "undo the last change or delete .venv")


def run(step: str, arguments: List[str], remedy: str, python: str = str(PYTHON)) -> None:
    """Run Python with its output in the log; a failure names the step, the error and what to do."""
    with open(str(LOG), "a+") as log:
        begin = log.seek(0, os.SEEK_END)
        status = subprocess.call(
            [python] + arguments,
            cwd=str(ROOT),
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.seek(begin)
        if status != 0:
            cause = error_in(log.read())
            raise Failure("{} failed ({}); {}, then try again (log: {}).".format(step, cause, remedy, LOG))


def clean_environment(variables: Mapping[str, str]) -> Dict[str, str]:
    """Without what would lead Python or pip away from .venv, or keep compiled files from being written.

    Settings of where pip finds packages stay.
    """
    misleading = {
        "PIP_PREFIX",
        "PIP_ROOT",
        "PIP_TARGET",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONHOME",
        "PYTHONPATH",
        "PYTHONPYCACHEPREFIX",
    }
    return dict({name: value for name, value in variables.items() if name not in misleading}, PIP_USER="0")


def error_in(output: str) -> str:
    """The line of the output that says best what went wrong: pip's last error, or just the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1].rstrip(".")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
