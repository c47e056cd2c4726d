#!/usr/bin/env python3
"""Classifies handwritten digits in float16 with PyTorch, with or without a loss scale."""

from __future__ import annotations

import ada_loss.torch as ada  # isort: skip  (says what to install without PyTorch)

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "common"))

from command_line import HelpFormatter, OneSentenceParser, count
from digit_images import load_sources
from errors import InputError, ends_cleanly

SCALERS = {
    "none": lambda: torch.amp.GradScaler("cpu", enabled=False),
    "torch": lambda: torch.amp.GradScaler("cpu"),
    "ada": lambda: ada.GradScaler("cpu"),
}
BATCH_SIZE, TRAINING_IMAGES, MOST_PROCESSES = 32, 1400, 24


@ends_cleanly
def main() -> int:
    parser = OneSentenceParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--scaler", choices=SCALERS, default="ada", help="what scales gradients")
    parser.add_argument("--epoch", type=count, default=10, help="how many epochs")
    options = parser.parse_args()

    torch.manual_seed(0)
    scans, numbers, _ = load_sources()
    images, labels = torch.tensor(scans, dtype=torch.float32).flatten(1), torch.tensor(numbers)
    order = torch.randperm(len(images))
    training, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]

    model: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))
    with processes() as (rank, world_size):
        if world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scaler = SCALERS[options.scaler]()

        batches = [b for _ in range(options.epoch) for b in shuffled(training).split(BATCH_SIZE)]
        for step, batch in enumerate(batches, 1):
            mine = batch[rank::world_size]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(images[mine]).float(), labels[mine])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if rank == 0:
                print(f"\rstep {step}/{len(batches)}  loss {loss.item():.4f}", end="", flush=True)

        with torch.no_grad():
            accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        if rank == 0:
            print(f"\naccuracy {accuracy:.3f} on test images, scaler {options.scaler}")
    return 0


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """This process's number and how many there are: as torchrun started them, or one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        if dist.get_world_size() > MOST_PROCESSES:
            raise InputError(f"A batch has no images for more than {MOST_PROCESSES} processes: start fewer.")
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def shuffled(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[torch.randperm(len(numbers))]


if __name__ == "__main__":
    sys.exit(main())
