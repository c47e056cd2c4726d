from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer
from processes import environment

from augmentation import DIGITS_RECIPE
from batches import BatchIterator, Schedule
from data_digits import DIGIT_CLASSES, TRAIN_PARTS
from data_voc import open_parts
from encoding import TrainingSamples
from models import build_model


@pytest.fixture
def samples(digits) -> TrainingSamples:
    dataset = open_parts(digits, TRAIN_PARTS, DIGIT_CLASSES, use_difficult=False)
    return TrainingSamples.of_model(
        dataset, build_model("small", 10, "lecun-uniform", 0), DIGITS_RECIPE, seed=0
    )


def assert_same_batches(first, second) -> None:
    for batch, other in zip(first, second, strict=True):
        for sample, twin in zip(batch, other, strict=True):
            for part, same in zip(sample, twin, strict=True):
                np.testing.assert_array_equal(part, same)


@pytest.mark.parametrize(("n_samples", "batch_size"), [(12, 4), (10, 4), (3, 8)])
def test_every_sample_comes_once_an_epoch(n_samples, batch_size):
    schedule = Schedule(n_samples, batch_size, seed=1)
    iterations = n_samples * batch_size // np.gcd(n_samples, batch_size) // batch_size
    seen = Counter(pair for iteration in range(iterations) for pair in schedule.share(iteration))
    epochs = iterations * batch_size // n_samples
    assert seen == Counter((epoch, index) for epoch in range(epochs) for index in range(n_samples))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_the_ranks_shares_are_the_batch_of_one_rank(n_ranks):
    alone = Schedule(13, 8, seed=2)
    ranks = [Schedule(13, 8, seed=2, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    for iteration in range(10):
        shares = [rank.share(iteration) for rank in ranks]
        assert {len(share) for share in shares} == {8 // n_ranks}
        assert [pair for share in shares for pair in share] == alone.share(iteration)


def test_seeds_and_epochs_have_different_orders():
    orders = [
        [index for _, index in Schedule(50, 50, seed).share(epoch)] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(map(tuple, orders))) == 4


def test_the_iterator_counts_epochs(samples):
    iterator = BatchIterator(samples, Schedule(len(samples), 8, seed=0))
    seen = []
    for _ in range(3):
        next(iterator)
        seen.append((iterator.epoch, iterator.is_new_epoch, iterator.epoch_detail))
    assert seen == [(0, False, 8 / 12), (1, True, 16 / 12), (2, True, 2.0)]


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_restored_iterator_goes_on_where_the_saved_one_was(samples, loaders):
    schedule = Schedule(len(samples), 4, seed=0)
    reference = BatchIterator(samples, schedule)
    batches = [next(reference) for _ in range(5)]
    iterator = BatchIterator(samples, schedule, loaders)
    assert_same_batches([next(iterator) for _ in range(2)], batches[:2])
    saved = DictionarySerializer()
    iterator.serialize(saved)
    next(iterator)
    iterator.serialize(NpzDeserializer(saved.target))
    assert_same_batches([next(iterator) for _ in range(3)], batches[2:])
    iterator.finalize()


PARENT = """
import sys
from pathlib import Path
from batches import BatchIterator, Schedule
from augmentation import DIGITS_RECIPE
from data_digits import DIGIT_CLASSES, TRAIN_PARTS
from data_voc import open_parts
from encoding import TrainingSamples
from models import build_model

if __name__ == "__main__":
    dataset = open_parts(Path(sys.argv[1]), TRAIN_PARTS, DIGIT_CLASSES, use_difficult=False)
    model = build_model("small", 10, "lecun-uniform", 0)
    samples = TrainingSamples.of_model(dataset, model, DIGITS_RECIPE, seed=0)
    iterator = BatchIterator(samples, Schedule(len(samples), 2, seed=0), loaders=1)
    next(iterator)
    print(*iterator._source._pool._processes, flush=True)
    sys.stdin.read()
"""


def test_loaders_end_with_a_killed_parent(digits, tmp_path):
    parent_script = tmp_path / "parent.py"
    parent_script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(parent_script), str(digits)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        (loader,) = map(int, parent.stdout.readline().split())
        os.kill(loader, 0)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(loader) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(loader)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
