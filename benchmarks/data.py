"""How long the small SSD's images, boxes and suppression take, as a share of its training iteration.

    python benchmarks/data.py [--dataset-dir FOLDER] [--kernels auto] [--quick]

Each turn prepares a batch of digits, trains on it and detects in it, one image after the other in this
process. A round has ten turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from machine import Machine
from program import parser, start
from readme_tables import table
from side_by_side import Quartiles, Timings, rounds_within, run, take_turns
from workloads import CYCLE, METHODS, Training, detector

import chainer  # isort: skip  (made importable by the workloads)
from chainer.backends import cuda
from chainer.dataset import concat_examples

from annotations import Objects
from augmentation import augment
from batches import Schedule
from datasets import DATASETS
from detector import EVALUATION_THRESH, Detector, pick_boxes, softmax
from encoding import Detections, Sample, TrainingSamples
from evaluation import evaluate
from optimization import learning_rate
from ranks import Alone
from recipes import SMALL_RECIPE

METHOD = "auto"
BATCHSIZE = 8
WARMING_UP = 125
"""Iterations before anything counts; an epoch is over then, and the detector finds less everywhere."""

LOADING = {
    "reading": "pixels and boxes, from files at first",
    "augmentation": "colours, crop, flip, size",
    "encoding": "boxes to what is learned",
}
SUPPRESSION = {"suppression": "outputs to boxes, from a score of 0.01 on"}
"""The phases that are not the network's; the last belongs to evaluations only."""

Indices = list[tuple[int, int]]
"""(epoch, index) of a batch's samples."""


def main() -> None:
    options = arguments()
    report = start("data", options)
    report.add(measure(report.machine, options))
    if not options.quick:
        report.write()


def arguments() -> argparse.Namespace:
    made = parser(__doc__.split("\n\n")[0])
    made.add_argument("--dataset-dir", type=Path, help="where the digits are (default: the example's)")
    made.add_argument("--seconds", type=float, default=60, help="about (default: %(default)s)")
    return made.parse_args()


def measure(machine: Machine, options: argparse.Namespace) -> str:
    """Time the phases side by side; returns the table and what an evaluation takes."""
    kind = DATASETS["digits"]
    training = Training(detector("small", "small SSD", BATCHSIZE), METHODS[METHOD], machine, options.seed)
    samples = TrainingSamples.of_model(
        kind.open_train(options.dataset_dir), training.chain.model, kind.recipe, options.seed
    )
    whole = Whole(training, samples, machine)
    schedule = Schedule(len(samples), BATCHSIZE, options.seed)
    batches = map(schedule.share, count())
    for i in range(2 if options.quick else WARMING_UP):
        training.optimizer.lr = learning_rate(SMALL_RECIPE.lr, (), SMALL_RECIPE.warm_up, i)
        run(whole, next(batches))
    rng, programs = np.random.default_rng(options.seed), {"": whole}
    turns, rounds = 1, 2
    if not options.quick:
        first = take_turns(programs, batches, rng, rounds=1, clock=machine.clock)
        turns, rounds = CYCLE, rounds_within(options.seconds / CYCLE, first)
    timings = take_turns(programs, batches, rng, rounds=rounds, turns=turns, clock=machine.clock)
    test_set = kind.open_test(options.dataset_dir)
    began = time.perf_counter()
    for i in range(len(test_set)):
        read(test_set, i)
    first = 1000 * BATCHSIZE * (time.perf_counter() - began) / len(test_set)
    began = time.perf_counter()
    evaluate(Detector(training.chain.model), kind.open_test(options.dataset_dir), Alone())
    evaluation = time.perf_counter() - began
    return (
        f"small SSD, digits, batch {BATCHSIZE}, {METHOD}: {rounds} rounds of {turns} turns\n\n"
        f"{as_table(timings)}\n\n"
        f"From files, as in the first epoch, {BATCHSIZE} images take {first:.2f} ms; a small set is in "
        f"memory then. Evaluation of {len(test_set)} images: {evaluation:.1f} s. A run evaluates where its "
        "learning rate falls and at its end."
    )


def read(dataset: Detections, i: int) -> tuple[np.ndarray, Objects]:
    return dataset.image(i), dataset.objects(i)


class Whole:
    """A program that prepares a batch, trains on it and detects in it.

    training: of a detector. samples: what it is prepared from.
    """

    def __init__(self, training: Training, samples: TrainingSamples, machine: Machine) -> None:
        self._training = training
        self._samples = samples
        self._machine = machine

    def __call__(self, batch: Indices) -> Iterator[str]:
        samples, data = self._samples, self._samples.dataset
        found = [read(data, index) for _, index in batch]
        yield "reading"
        changed = [
            augment(
                image,
                objects.bbox,
                objects.label,
                samples.side,
                samples.mean,
                samples.recipe,
                np.random.default_rng([samples.seed, *place]),
            )
            for (image, objects), place in zip(found, batch, strict=True)
        ]
        yield "augmentation"
        encoded = [
            Sample(image - samples.mean, *samples.coder.encode(bbox, label)) for image, bbox, label in changed
        ]
        yield "encoding"
        arrays = self._machine.send(concat_examples(encoded))
        run(self._training, arrays)
        yield "iteration"
        outputs = self._outputs(arrays[0])
        yield "inference"
        locs, logits = outputs
        for loc, scores in zip(locs, softmax(logits), strict=True):
            pick_boxes(samples.coder.decode(loc), scores[:, 1:], EVALUATION_THRESH)
        yield "suppression"

    def _outputs(self, images: np.ndarray) -> list[np.ndarray]:
        model = self._training.chain.model
        with chainer.using_config("train", False), chainer.no_backprop_mode():
            outputs = model(images.astype(np.float16))
        return [cuda.to_cpu(output.array).astype(np.float32) for output in outputs]


def as_table(timings: Timings) -> str:
    def seconds(*phases: str) -> np.ndarray:
        return np.sum([timings.seconds("", phase) for phase in phases], axis=0)

    iteration = seconds("iteration")
    every_phase = LOADING | SUPPRESSION
    shown = {"training iteration": iteration}
    shown |= {f"{phase}: {what}": seconds(phase) for phase, what in every_phase.items()}
    shown["all but suppression"] = seconds(*LOADING)
    shown["all"] = seconds(*every_phase)
    rows = []
    for name, taken in shown.items():
        low, middle, high = Quartiles.of(taken / iteration)
        rows.append([name, f"{1000 * np.median(taken):.2f}", f"{middle:.1%}", f"{low:.1%} to {high:.1%}"])
    return table([f"for {BATCHSIZE} images", "ms", "share of the iteration", "quartiles"], rows)


if __name__ == "__main__":
    main()
