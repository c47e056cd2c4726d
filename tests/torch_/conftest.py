"""PyTorch is optional: without it there is nothing to test here."""

import zlib

import pytest

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install "ada-loss[torch]"')


@pytest.fixture(autouse=True)
def _seed(request):
    """Weights and inputs of a test's own, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
