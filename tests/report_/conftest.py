"""Runs that the tests of the report share; each is trained once."""

import pytest

from ada_loss.report.facts import load
from report_.training import METHODS, Task, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Directories of one training by every method."""
    root = tmp_path_factory.mktemp("runs")
    return {method: train(root / method, method, Task(batch=32, width=24), steps=80) for method in METHODS}


@pytest.fixture(scope="session")
def runs(trained):
    """What is to be said of these trainings."""
    return load(list(trained.values()))


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    """A training whose forward pass overflows, cut in the middle of a line."""
    directory = train(tmp_path_factory.mktemp("broken"), "auto", Task(broken_at=20), end=False)
    path = directory / "records.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - 100])
    return directory
