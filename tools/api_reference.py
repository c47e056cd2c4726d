#!/usr/bin/env python3
"""Builds the reference of the package from its docstrings, as HTML, with pdoc.

    .venv/bin/python tools/api_reference.py [DIRECTORY]

Modules whose requirements are not installed are left out, and named. Exit status 0 when the pages are made,
pdoc's own when a docstring cannot be rendered.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PARTS = ["ada_loss", *(f"ada_loss.{part}" for part in ("chainer", "torch", "core", "arrays", "report"))]

# Before Chainer, which some module imports first.
import ada_loss.chainer.compat  # noqa: E402, F401


def main(arguments: Sequence[str]) -> int:
    directory = arguments[0] if arguments else str(ROOT / "build" / "api")
    left_out = list(not_importable("ada_loss"))
    if left_out:
        print(f"Without a page, as something that they need is not installed: {', '.join(left_out)}.")
    command = [sys.executable, "-W", "ignore", "-m", "pdoc", "--docformat", "google", "-o", directory]
    parts = [part for part in PARTS if part not in left_out]
    modules = [*parts, *(f"!{name}" for name in left_out)]
    return subprocess.call([*command, *modules], cwd=ROOT)


def not_importable(package: str) -> list[str]:
    """The modules of a package that cannot be imported here; of a package in it, just its name."""
    found: list[str] = []
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if any(module.name.startswith(f"{name}.") for name in found):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError:
            found.append(module.name)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
