"""Chainer needs the compatibility layer before its first import."""

import ada_loss.chainer.compat  # noqa: F401  isort: skip

import zlib

import numpy as np
import pytest

from ada_loss.chainer import kernels

# Plain and scaled models run on the same kernels, whichever comes first.
kernels.use_by_default("numpy")


@pytest.fixture
def rng(request):
    """Random numbers of a test's own, the same in every run."""
    return np.random.default_rng(_seed(request))


@pytest.fixture(autouse=True)
def _initial_weights(request):
    """Chainer draws these from NumPy's global generator."""
    np.random.seed(_seed(request))


def _seed(request):
    return zlib.crc32(request.node.nodeid.encode())
