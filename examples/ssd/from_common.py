"""Puts the modules that the examples share on the path, for whoever has only this folder there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

COMMON = Path(__file__).resolve().parents[1] / "common"
if str(COMMON) not in sys.path:
    sys.path.append(str(COMMON))


def load(name: str) -> None:
    """Make a module of examples/common the one that is imported under this name."""
    spec = importlib.util.spec_from_file_location(name, COMMON / f"{name}.py")
    assert spec is not None and spec.loader is not None, "the path ends with .py"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
