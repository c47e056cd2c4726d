"""A training run from its parts to result.json: what the examples do with a model, data and an optimizer."""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chainer
import numpy as np
from chainer.training import Trainer, extensions
from chainer.training.extension import PRIORITY_WRITER
from chainer.training.updaters import StandardUpdater

from ada_loss.chainer import Diverged, kernels
from checkpoints import FOLDER, Checkpoints, RandomState, resume
from errors import DIVERGED, InputError
from files import locked, write_json
from ranks import Alone, choose_communicator, choose_device, start_ranks
from threads import use_half_of_the_cores

LOG_FILE, RESULT_FILE, LOCK_FILE, WEIGHTS_FILE = "log.json", "result.json", ".lock", "model.npz"

Trigger = Callable[[Trainer], bool]


@dataclass(frozen=True)
class Plan:
    """How long a run is, what is looked at on the way, and what it is called.

    Attributes:
        iterations: how many updates.
        learning_rate: that of the update after so many updates.
        scaling: the loss scaling, in a few words.
        evaluate: figures of the model now, on validation data; every rank calls it, and gets them.
        best: the figure whose largest value is kept as the best one.
        evaluated, logged, saved: every so many iterations, and at the last one.
        settings: what a run has to share with the one that it resumes. Goes to result.json as well.
    """

    iterations: int
    scaling: str
    learning_rate: Callable[[int], float]
    evaluate: Callable[[], dict[str, float]]
    best: str
    evaluated: int
    logged: int
    saved: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What trains.

    Attributes:
        ranks: the processes.
        device: that of this process.
        seed: the same on all ranks.
    """

    ranks: Alone
    device: chainer.backend.Device
    seed: int


@contextmanager
def started(options: Any, dtype: Any) -> Iterator[Machine]:
    """In this block the ranks are joined, they alone write `--out`, and models are made in `dtype`.

    Raises InputError if this machine can't do what the options say, or an earlier run would be overwritten.
    """
    use_half_of_the_cores()
    ranks = start_ranks()
    with ranks.ending_together():
        gpu, communicator = ranks.together(lambda: _look_at_machine(options, ranks))
        ranks = ranks.connected(communicator)
        device = chainer.get_device("@numpy" if gpu is None else f"@cupy:{gpu}")
        device.use()
        fresh = secrets.randbelow(2**31) if options.manual_seed is None else options.manual_seed
        seed = ranks.broadcast(fresh)
        np.random.seed(seed)
        with (
            chainer.using_config("dtype", dtype),
            kernels.using(options.kernels),
            _reserved(options.out, options.resume, ranks),
        ):
            yield Machine(ranks, device, seed)


def train(
    plan: Plan, iterator: Any, optimizer: Any, model: chainer.Link, machine: Machine, options: Any
) -> int:
    """Train and write log, weights and result.json to `--out`; returns an exit status. All ranks call it."""
    ranks = machine.ranks
    ranks.share_parameters(optimizer)
    updater = StandardUpdater(iterator, optimizer, device=machine.device)
    trainer = Trainer(updater, _stop_after(plan.iterations), out=str(options.out))
    _extend(trainer, plan, ranks)
    if options.resume is not None:
        _resume(trainer, options, plan, ranks)
    outcome, message = "finished", ""
    try:
        trainer.run(show_loop_exception_msg=False)
    except Diverged as error:
        outcome, message = "diverged", str(error)
    figures = [row[plan.best] for row in trainer.get_extension("LogReport").log if plan.best in row]
    result = {
        "scaling": plan.scaling,
        "outcome": outcome,
        "message": message,
        plan.best: figures[-1] if figures and outcome == "finished" else None,
        f"best {plan.best}": max(figures, default=None),
        "skipped_steps": _skipped(optimizer),
        "iterations": updater.iteration,
        "seconds": round(trainer.elapsed_time, 1),
        "ranks": ranks.size,
        "settings": plan.settings,
    }
    if ranks.rank == 0:
        if outcome == "finished":
            chainer.serializers.save_npz(options.out / WEIGHTS_FILE, model)
        write_json(options.out / RESULT_FILE, result)
        print(message or f"{plan.best} {figures[-1]:.4f}", f"| {options.out / RESULT_FILE}", flush=True)
    return 0 if outcome == "finished" else DIVERGED


def every(interval: int, last: int) -> Trigger:
    """Fires every `interval` iterations and at the last one."""
    return lambda trainer: trainer.updater.iteration % interval == 0 or trainer.updater.iteration == last


def _stop_after(iterations: int) -> Trigger:
    # Chainer's own trigger would let a run that is resumed at its end go on for ever.
    return lambda trainer: trainer.updater.iteration >= iterations


def _extend(trainer: Trainer, plan: Plan, ranks: Alone) -> None:
    optimizer = trainer.updater.get_optimizer("main")
    evaluated, saved = (every(interval, plan.iterations) for interval in (plan.evaluated, plan.saved))
    regularly = every(plan.logged, plan.iterations)
    # An evaluation has a row of its own, or the row would hold a mean over two of them.
    logged: Trigger = lambda trainer: regularly(trainer) or evaluated(trainer)  # noqa: E731

    @chainer.training.make_extension(priority=PRIORITY_WRITER + 1)
    def set_learning_rate(trainer: Trainer) -> None:
        optimizer.lr = plan.learning_rate(trainer.updater.iteration)

    @chainer.training.make_extension(priority=PRIORITY_WRITER)
    def report_figures(trainer: Trainer) -> None:
        ranks.share_statistics(optimizer.target)
        chainer.report(plan.evaluate())

    @chainer.training.make_extension(priority=PRIORITY_WRITER)
    def report_state(trainer: Trainer) -> None:
        chainer.report({"lr": optimizer.lr, "skipped": _skipped(optimizer)})

    def complete(row: dict[str, float]) -> None:
        # In the same order on all ranks, or one would add its loss to another's accuracy.
        for name in ("main/loss", "main/accuracy"):
            if name in row:
                row[name] = ranks.mean(row[name])
        if not math.isfinite(row["main/loss"]):
            raise Diverged(f"Training diverged: the loss is {row['main/loss']}.")

    trainer.extend(report_figures, name="Figures", trigger=evaluated)
    trainer.extend(report_state, name="State", trigger=logged)
    always = (1, "iteration")
    trainer.extend(set_learning_rate, name="LearningRate", trigger=always, call_before_training=True)
    log_file = LOG_FILE if ranks.rank == 0 else None
    log = extensions.LogReport(trigger=logged, filename=log_file, postprocess=complete)
    trainer.extend(log, name="LogReport", trigger=always)
    if ranks.rank == 0:
        columns = ["iteration", "main/loss", "lr", "skipped", plan.best, "elapsed_time"]
        trainer.extend(extensions.PrintReport(columns, out=_PlainOutput()), trigger=logged)
    trainer.extend(RandomState(), name="RandomState", trigger=lambda trainer: False)
    checkpoints = Checkpoints(Path(trainer.out) / FOLDER, plan.settings, ranks)
    trainer.extend(checkpoints, name="Checkpoints", trigger=saved)


class _PlainOutput:
    """Standard output without the control codes that Chainer's report moves the cursor with."""

    def write(self, text: str) -> None:
        sys.stdout.write(text.replace("\033[J", ""))

    def flush(self) -> None:
        sys.stdout.flush()


def _skipped(optimizer: Any) -> int:
    """How many steps overflowed and were skipped; none without loss scaling."""
    entry_scale = getattr(optimizer, "entry_scale", None)
    return 0 if entry_scale is None else entry_scale.skipped


def _look_at_machine(options: Any, ranks: Alone) -> tuple[int | None, str]:
    try:
        kernels.provider(options.kernels)
    except ImportError as error:
        raise InputError(str(error)) from None
    gpu = choose_device(options.device, ranks)
    return gpu, choose_communicator(options.communicator, on_gpu=gpu is not None)


def _resume(trainer: Trainer, options: Any, plan: Plan, ranks: Alone) -> None:
    origin = options.out if options.resume == "auto" else Path(options.resume)
    iteration = resume(trainer, origin, plan.settings, ranks)
    if iteration is None and options.resume != "auto":
        raise InputError(f"There is no complete checkpoint in {origin}: name another, or leave --resume out.")
    if iteration is not None and ranks.rank == 0:
        print(f"Goes on after iteration {iteration}.", flush=True)


@contextmanager
def _reserved(out: Path, resume: str | None, ranks: Alone) -> Iterator[None]:
    """In this block the folder exists and only these ranks write there."""

    with ExitStack() as held:

        def enter() -> None:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{out} can't be made ({error.strerror}): name another with --out."
                ) from None
            if ranks.rank == 0:
                held.enter_context(_alone_in(out))
            # Under the lock, or two runs might both find the folder empty.
            if resume is None and (out / LOG_FILE).exists():
                raise InputError(
                    f"{out} holds an earlier run: name another with --out, or go on with --resume auto."
                )

        ranks.rank_0_first(enter)
        yield


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(locked(out / LOCK_FILE))
        except BlockingIOError:
            raise InputError(f"Another run is writing to {out} now: write to another folder.") from None
        except OSError as error:
            raise InputError(f"{out} can't be written to ({error.strerror}): name another.") from None
        yield
