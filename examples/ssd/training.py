"""Assembles a training run from its settings and carries it out."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chainer
import cv2
import numpy as np
from chainer.backends import cuda
from chainer.training import Extension, StandardUpdater, Trainer
from chainer.training.extension import PRIORITY_WRITER
from chainercv.links.model.ssd import SSD

from ada_loss.chainer import AdaLossScaled, Diverged, kernels, prepare
from ada_loss.chainer.extensions import Record
from ada_loss.chainer.recording import scale_range
from ada_loss.core.rules import RULES
from arguments import Settings
from batches import BatchIterator, Schedule
from checking import look_through
from checkpoints import FOLDER, Checkpoints, RandomState, resume
from data_voc import JoinedDatasets
from datasets import DATASETS
from detector import Detector
from encoding import TrainingSamples
from errors import InputError, SharedInputError, caution
from evaluation import evaluate, mean_precision
from files import write_json
from loss import MultiboxLoss
from models import build_model, input_dtype
from optimization import learning_rate, make_optimizer
from output import RESULT_FILE
from ranks import Alone
from reporting import LeavesOutSkippedSteps, StopAfter, add_reports, at, either, every, log_rows
from snapshots import BestWeights, LastGoodWeights
from weights import find_pretrained, load_weights, save_weights, weights_of

WEIGHTS_FILE = "model.npz"


def scale_gradients(model: SSD, settings: Settings) -> chainer.Link:
    """The model with the loss scaling asked for; `prepare_optimizer` is the other half of it."""
    return model if settings.dtype == "float32" else AdaLossScaled(model, **settings.scaling)


def prepare_optimizer(optimizer: Any, settings: Settings) -> Any:
    return optimizer if settings.dtype == "float32" else prepare(optimizer)


class TrainChain(chainer.Chain):
    """A detector and its loss: a function of a batch of samples."""

    def __init__(self, model: chainer.Link, loss: MultiboxLoss, multiplier: float) -> None:
        super().__init__()
        with self.init_scope():
            self.model = model
        self._loss = loss
        self._multiplier = multiplier
        self._dtype = input_dtype(model)

    def forward(
        self, images: np.ndarray, gt_mb_locs: np.ndarray, gt_mb_labels: np.ndarray
    ) -> chainer.Variable:
        mb_locs, mb_confs = self.model(images.astype(self._dtype, copy=False))
        loc_loss, conf_loss = self._loss(mb_locs, mb_confs, gt_mb_locs, gt_mb_labels)
        loss = loc_loss + conf_loss
        chainer.report({"loss": loss, "loss/loc": loc_loss, "loss/conf": conf_loss}, self)
        return loss * self._multiplier


@dataclass(frozen=True)
class Run:
    """A training run, assembled and not yet begun."""

    settings: Settings
    ranks: Alone
    model: SSD
    trainer: Trainer

    def train(self) -> dict[str, Any]:
        """Train and write weights and result.json; returns what that file holds. All ranks call it."""
        outcome, message = "finished", None
        try:
            self.trainer.run(show_loop_exception_msg=False)
            weights = weights_of(self.model)
        except Diverged as error:
            good = self.trainer.get_extension("LastGoodWeights")
            weights = good.arrays
            kept = f"{WEIGHTS_FILE} holds the last good weights, those after {good.iteration} iterations."
            outcome, message = "diverged", f"{error} {kept}"
        result = self._result(outcome, message)
        if self.ranks.rank == 0:
            save_weights(self.settings.out / WEIGHTS_FILE, weights)
            write_json(self.settings.out / RESULT_FILE, result)
        return result

    def _result(self, outcome: str, message: str | None) -> dict[str, Any]:
        evaluated = [row for row in log_rows(self.trainer) if "map" in row]
        last = evaluated[-1] if evaluated and outcome == "finished" else {}
        skipped, scale = scaling_state(self.trainer.updater.get_optimizer("main"))
        return {
            "method": method_name(self.settings),
            "outcome": outcome,
            "message": message,
            "map": last.get("map"),
            "average_precision": {
                name: last.get(f"ap/{name}") for name in DATASETS[self.settings.dataset].classes
            },
            "seed": self.settings.seed,
            "iterations": self.trainer.updater.iteration,
            "seconds": round(self.trainer.elapsed_time, 1),
            "skipped_steps": skipped,
            "final_scale": scale,
            "ranks": self.ranks.size,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "kernels": kernels.current(),
            "settings": self.settings.as_json(),
        }


def assemble(settings: Settings, ranks: Alone, device: int | None) -> Run:
    """Everything that a run needs, brought to where the checkpoint stands that it resumes. All ranks call it.

    Raises InputError on all of them if something is amiss, before any file is written. `--out` has to be
    reserved for them by then. `device` is the number of a GPU; None stands for the CPU.
    """
    cv2.setNumThreads(0)
    np.random.seed(settings.seed + ranks.rank)
    # What is made or fetched should be so once.
    train_set, test_set, model = ranks.rank_0_first(lambda: _open_inputs(settings))
    if settings.check:
        look_through(train_set, test_set, ranks)
    matching = settings.match_threshold, settings.match_ties
    recipe = DATASETS[settings.dataset].recipe
    samples = TrainingSamples.of_model(train_set, model, recipe, settings.seed, *matching)
    if device is not None:
        cuda.get_device_from_id(device).use()
        model.to_gpu()
    loss = MultiboxLoss(settings.loss_norm, ranks.mean, settings.alpha, settings.negative_ratio)
    chain = TrainChain(scale_gradients(model, settings), loss, settings.loss_multiplier)
    optimizer = prepare_optimizer(ranks.multi_node(make_optimizer(chain, settings.loss_multiplier)), settings)
    ranks.share_parameters(optimizer)
    schedule = Schedule(len(samples), settings.batchsize, settings.seed, ranks.rank, ranks.size)
    iterator = BatchIterator(samples, schedule, settings.loaders)
    updater = StandardUpdater(iterator, optimizer, device=device)
    trainer = Trainer(updater, StopAfter(settings.iteration), out=str(settings.out))
    _extend(trainer, settings, ranks, model, test_set)
    if settings.resume is not None:
        _resume(trainer, settings.resume, settings, ranks)
    if settings.batchsize > len(samples):
        caution(
            f"--batchsize {settings.batchsize} is more than the {len(samples)} training images: a batch "
            "holds some of them several times."
        )
    return Run(settings, ranks, model, trainer)


class LearningRate(Extension):
    """Sets the optimizer's learning rate for the next update."""

    def __init__(self, optimizer: Any, settings: Settings) -> None:
        self._optimizer = optimizer
        self._settings = settings

    def initialize(self, trainer: Trainer) -> None:
        self(trainer)

    def __call__(self, trainer: Trainer) -> None:
        settings, done = self._settings, trainer.updater.iteration
        self._optimizer.lr = learning_rate(settings.lr, settings.step, settings.warm_up, done)


def scaling_state(optimizer: Any) -> tuple[int, float]:
    """How many steps were skipped so far, and the scale of the loss now, 1 without loss scaling."""
    entry = getattr(optimizer, "entry_scale", None)
    return (optimizer.skipped, 1.0) if entry is None else (entry.skipped, entry.scale)


def records_gradients(settings: Settings) -> bool:
    """Whether a run records its gradients: in float32 none would be lost."""
    return settings.record_interval > 0 and settings.dtype != "float32"


def method_name(settings: Settings) -> str:
    """The loss scaling of a run in a few words."""
    if settings.dtype == "float32":
        return "float32"
    if RULES[settings.loss_scale_method].measures:
        every = settings.update_per_n_iteration
        interval = f", chosen every {every} iterations" if every > 1 else ""
        return settings.loss_scale_method + interval + (", delayed" if settings.timing == "delayed" else "")
    if settings.dynamic_interval is not None:
        return f"dynamic, interval {settings.dynamic_interval}"
    return "no loss scale" if settings.init_scale == 1 else f"fixed {settings.init_scale:g}"


def summary(result: dict[str, Any], out: Path) -> str:
    """A run in one line."""
    settings = result["settings"]
    precision = "no mAP" if result["map"] is None else f"mAP {result['map']:.4f}"
    return (
        f"{settings['model']} on {settings['dataset']} | {settings['dtype']}, {result['method']} "
        f"| seed {result['seed']} | {result['outcome']} after {result['iterations']} iterations "
        f"in {result['seconds']:.0f} s | {precision} | {result['skipped_steps']} steps skipped "
        f"| {out / RESULT_FILE}"
    )


def _open_inputs(settings: Settings) -> tuple[JoinedDatasets, JoinedDatasets, SSD]:
    kind = DATASETS[settings.dataset]
    train_set, test_set = kind.open_train(settings.dataset_dir), kind.open_test(settings.dataset_dir)
    weights = find_pretrained(settings.pretrained, settings.model_dir)
    model = build_model(
        settings.model, len(kind.classes), settings.initializer, settings.seed, settings.variances
    )
    if weights is not None:
        load_weights(weights, model, partial=True)
    return train_set, test_set, model


def _extend(trainer: Trainer, settings: Settings, ranks: Alone, model: SSD, test_set: JoinedDatasets) -> None:
    last = settings.iteration
    optimizer = trainer.updater.get_optimizer("main")
    evaluated = either(at(settings.step), every(settings.evaluation_interval or last, last))
    # An evaluation has a row of its own, or the row would hold a mean over two of them.
    logged = either(every(settings.log_interval, last), evaluated)
    detector = Detector(
        model,
        decoder=settings.decoder,
        nms_thresh=settings.nms_threshold,
        limit=settings.top_k,
        batch_size=settings.test_batchsize,
    )

    records = Record(every=settings.record_interval or 1, metrics=("map",), name=method_name(settings))
    recorded = ranks.rank == 0 and records_gradients(settings)

    def skipped() -> int:
        return scaling_state(optimizer)[0]

    def report_state(trainer: Trainer) -> None:
        skipped, scale = scaling_state(optimizer)
        chainer.report({"lr": optimizer.lr, "skipped": skipped, "scale": scale})
        if settings.dtype != "float32":
            smallest, largest = scale_range(optimizer)
            chainer.report({"scale/min": 2.0**smallest, "scale/max": 2.0**largest})
        if recorded and records.lost is not None:
            chainer.report({"underflow": records.lost})

    def report_precision(trainer: Trainer) -> None:
        precisions = evaluate(detector, test_set, ranks)
        mean = None if precisions is None else mean_precision(precisions)
        if mean is not None:
            names = DATASETS[settings.dataset].classes
            found = {f"ap/{name}": ap for name, ap in zip(names, precisions, strict=True) if np.isfinite(ap)}
            chainer.report({"map": mean, **found})

    trainer.extend(report_state, name="State", trigger=logged, priority=PRIORITY_WRITER + 1)
    trainer.extend(LearningRate(optimizer, settings), priority=PRIORITY_WRITER)
    trainer.extend(report_precision, name="Precision", trigger=evaluated, priority=PRIORITY_WRITER)
    trainer.extend(LeavesOutSkippedSteps(skipped), name="LeavesOutSkippedSteps")
    trainer.extend(BestWeights(model, ranks), name="BestWeights", trigger=evaluated)
    trainer.extend(LastGoodWeights(model, skipped, logged), name="LastGoodWeights", trigger=(1, "iteration"))
    add_reports(trainer, ranks, logged, evaluated, last, settings.tensorboard)
    if recorded:
        trainer.extend(records)
    trainer.extend(RandomState(), name="RandomState", trigger=at([]))
    checkpoints = Checkpoints(settings.out / FOLDER, settings.numerics(), ranks)
    trainer.extend(checkpoints, name="Checkpoints", trigger=every(settings.checkpoint_interval, last))


def _resume(trainer: Trainer, wanted: str, settings: Settings, ranks: Alone) -> None:
    origin = settings.out if wanted == "auto" else Path(wanted)
    iteration = resume(trainer, origin, settings.numerics(), ranks)
    if iteration is None:
        ranks.together(lambda: _check_that_a_run_may_begin(wanted, settings.out))
    elif iteration > settings.iteration:
        raise SharedInputError(
            f"The checkpoint in {origin} is of a run that is {iteration} iterations long already, and "
            f"--iteration is {settings.iteration}: use at least {iteration}, or another --out."
        )
    elif ranks.rank == 0:
        print(f"Goes on after iteration {iteration}.", flush=True)


def _check_that_a_run_may_begin(resume: str, out: Path) -> None:
    """There is no checkpoint: that is all right if none was named, and no result is there to overwrite."""
    if resume != "auto":
        raise InputError(
            f"There is no complete checkpoint in {resume}: name another one, or leave --resume out."
        )
    if (out / RESULT_FILE).exists():
        raise InputError(
            f"{out} holds a finished run without a complete checkpoint to go on from: name another folder "
            "with --out."
        )
