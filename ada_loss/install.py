"""`python -m ada_loss.install chainer`: installs what a part of this package needs.

    python -m ada_loss.install GROUP [GROUP ...]

Each GROUP is an extra of this package, with the same requirements. pip alone cannot install Chainer and
ChainerCV any more, since their setup.py needs a setuptools of their time: here pip is told so. Exit status 0
when everything is installed, pip's own when it fails, 2 with one sentence when it is not asked rightly.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"

CONSTRAINTS = REQUIREMENTS / "build-constraints.txt"
"""What holds for the environments in which packages are built, and only there."""

NOT_GROUPS = {"base", "build-constraints", "constraints", "pip"}

OLDEST_PIP = (25, 3)
"""The first pip with --build-constraint."""


def groups() -> list[str]:
    """The names of all groups."""
    return sorted({path.stem for path in REQUIREMENTS.glob("*.txt")} - NOT_GROUPS)


def main(arguments: Sequence[str]) -> int:
    """Install the groups that are named; the exit status."""
    unknown = [name for name in arguments if name not in groups()]
    if unknown or not arguments:
        problem = f"There is no group {', '.join(unknown)}" if unknown else "Name a group"
        print(f"ada_loss.install: {problem}; choose from {', '.join(groups())}.", file=sys.stderr)
        return 2
    with able_pip() as environment:
        return subprocess.call(command(arguments), env=environment)


def command(names: Sequence[str]) -> list[str]:
    """What installs the groups."""
    files = [word for name in names for word in ("-r", str(REQUIREMENTS / f"{name}.txt"))]
    return [sys.executable, "-m", "pip", "install", "--build-constraint", str(CONSTRAINTS), *files]


@contextmanager
def able_pip() -> Iterator[dict[str, str]]:
    """An environment whose pip is new enough: its own one, or one that is there only within the block."""
    environment = dict(os.environ)
    if tuple(int(part) for part in version("pip").split(".")[:2]) >= OLDEST_PIP:
        yield environment
        return
    with tempfile.TemporaryDirectory() as directory:
        subprocess.check_call(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            + ["--target", directory, "-r", str(REQUIREMENTS / "pip.txt")]
        )
        earlier = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = directory if not earlier else os.pathsep.join([directory, earlier])
        yield environment


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
