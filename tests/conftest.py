"""Chainer needs the compatibility layer before its first import."""

import ada_loss.chainer.compat  # noqa: F401  isort: skip

import zlib

import numpy as np
import pytest


@pytest.fixture
def rng(request):
    """Random numbers of a test's own, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
