"""The examples' scripts import each other as they lie; so do their tests."""

from __future__ import annotations

import sys

import ada_loss.chainer  # noqa: F401  (before Chainer)
from example_scripts import EXAMPLES

sys.path[:0] = [str(EXAMPLES / name) for name in ("common", "cifar", "imagenet", "segnet")]
