"""What the distributed tests run on every rank, and once more in a single process: `mn_program.py FOLDER`.

Each case returns arrays by name; rank r leaves them in FOLDER/CASE.r.npz.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import ada_loss.chainer as ada_loss_chainer

import chainer  # isort: skip
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import optimizers
from chainer.serializers import DictionarySerializer, NpzDeserializer

from ada_loss.chainer import AdaLossScaled, Diverged
from ada_loss.core.config import METHODS, TIMINGS
from helpers import dtype
from mn_agreement import accumulation, communication, delayed, exponents, own_timing, statistics
from mn_training import BATCH, no_norm, outcome, prepared, share, steps
from toy import batch, masters, training, values


def training_of(comm: Any, precision: str, **settings: Any) -> dict[str, Any]:
    """Some steps from weights that only rank 0 has; what became of the parameters, and of everything else."""
    with dtype(precision):
        target = training(precision, seed=comm.rank, **settings)
        optimizer = prepared(target, comm)
        steps(target, optimizer, comm, [1, 4, 0.5, 2])
    return outcome(target, optimizer)


def average(comm: Any, method: str, precision: str) -> dict[str, Any]:
    return training_of(comm, precision, method=method, norm=no_norm, init_scale=4)


class SumsInFloat16:
    """A communicator that sends float16 and adds in float16, as those that flatten gradients on GPUs may."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def multi_node_mean_grad(self, model: chainer.Link, zero_fill: bool = False) -> None:
        for _, parameter in sorted(model.namedparams()):
            if parameter.grad is not None:
                arrays = self._comm.mpi_comm.allgather(parameter.grad.astype(np.float16))
                parameter.grad[...] = sum(arrays[1:], start=arrays[0]) / np.float16(self._comm.size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def on_the_wire(comm: Any, method: str) -> dict[str, Any]:
    """True gradients near the end of float16's range are added in it; ranks have some of different size."""
    weight, small = 2.0**-20, np.repeat([1.0, 2.0**4], BATCH // 2)
    with dtype("mixed16"):
        target = training(method=method, norm=no_norm)
        target.weight = weight
        comm = comm if comm.size == 1 else SumsInFloat16(comm)
        optimizer = prepared(target, comm, optimizers.MomentumSGD(0.01 / weight), hooks=())
        optimizer.set_loss_scale(2.0**15)
        steps(target, optimizer, comm, [small, small[::-1], small])
    return outcome(target, optimizer)


def normalization(comm: Any, method: str, precision: str) -> dict[str, Any]:
    """Batch normalization over all ranks, whose gradients differ in magnitude and so in exponents."""

    def norm(channels: int) -> chainer.Link:
        if comm.size == 1:
            return L.BatchNormalization(channels)
        import chainermn

        return chainermn.links.MultiNodeBatchNormalization(channels, comm)

    with dtype(precision):
        target = training(precision, method=method, norm=norm)
        optimizer = prepared(target, comm)
        steps(
            target,
            optimizer,
            comm,
            [np.repeat([1.0, 2.0**-12], BATCH // 2), np.repeat([2.0**-12, 1.0], BATCH // 2)],
        )
    return outcome(target, optimizer)


def sharing(comm: Any) -> dict[str, Any]:
    """A layer that is registered twice."""
    with dtype("mixed16"):
        np.random.seed(7)
        layer = L.Linear(6, 6)
        model = AdaLossScaled(chainer.Sequential(layer, F.relu, layer))
        optimizer = prepared(model, comm)
        for _ in range(1 + (comm.size > 1)):
            start, rng = masters(model), np.random.default_rng(57)
            (x,) = share(batch(rng, BATCH)[:1], comm)
            optimizer.update(lambda x: F.mean(model(x) ** 2), x)
    return {path: array - start[path] for path, array in masters(model).items()}


class Branches(chainer.Chain):
    """A layer for everybody, and one for each rank that asks for it."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.common = L.Linear(6, 4)
            self.first, self.second = L.Linear(4, 2), L.Linear(4, 2)

    def forward(self, x: Any, names: Any) -> Any:
        h = self.common(x)
        return [getattr(self, name)(h) for name in names]


def branches(comm: Any, zero_fill: bool) -> dict[str, Any]:
    """Only the last rank's loss reaches the second layer, and 2**-20 times as strongly."""
    with dtype("mixed16"):
        np.random.seed(6)
        model = AdaLossScaled(Branches(), "fixed")
        x, _ = batch(np.random.default_rng(51), BATCH)
        optimizer = optimizers.SGD(1.0)
        if comm.size > 1:
            import chainermn

            optimizer = chainermn.create_multi_node_optimizer(optimizer, comm, zero_fill=zero_fill)
        ada_loss_chainer.prepare(optimizer.setup(model))
        for _ in range(1 + (comm.size > 1)):
            model.cleargrads()
            count = BATCH // 2
            parts = [("first", 1.0, slice(0, count))] * (comm.rank == 0)
            parts += [("second", 2.0**-20, slice(count, BATCH))] * (comm.rank == comm.size - 1)
            for name, magnitude, part in parts:
                (y,) = model(x[part], [name])
                F.sum(magnitude * y).backward()
            optimizer.update()
    return {path: gradient * comm.size for path, gradient in model.true_gradients().items()}


def overflow(comm: Any) -> dict[str, Any]:
    """A sample that overflows, on the last rank."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("ada_loss").addHandler(handler)
    with dtype("mixed16"):
        target = training(norm=no_norm, init_scale=16, update_per_n_iteration=2)
        optimizer = prepared(target, comm)
        steps(target, optimizer, comm, [1, 1])
        before = masters(target)
        steps(target, optimizer, comm, [[1] * (BATCH - 1) + [np.inf]], seed=52)
        unchanged = all(np.array_equal(before[path], array) for path, array in masters(target).items())
        steps(target, optimizer, comm, [1, 1], seed=53)
    logging.getLogger("ada_loss").removeHandler(handler)
    return {**outcome(target, optimizer), "unchanged": np.array(unchanged), "logged": np.array(len(records))}


def divergence(comm: Any) -> dict[str, Any]:
    with dtype("mixed16"):
        target = training(norm=no_norm)
        optimizer = prepared(target, comm)
        try:
            steps(target, optimizer, comm, [np.nan] * 100)
        except Diverged:
            return outcome(target, optimizer)
    return {}


def start(comm: Any) -> dict[str, Any]:
    """The first update, from different weights, masters and scales on every rank."""
    with dtype("mixed16"):
        target = training(norm=no_norm, seed=comm.rank)
        optimizer = prepared(target, comm)
        for parameter in target.params():
            if parameter.dtype == np.float16:
                parameter.master = parameter.array.astype(np.float32) * np.float32(1 + 2.0**-14)
        for _ in range(1 + comm.rank):
            target.model.ada_loss.policy.end_step(finite=False)
        before = values(target)
        optimizer.update(target, *share(batch(np.random.default_rng(54), BATCH), comm))
    changed = [not np.array_equal(before[path], array) for path, array in values(target).items()]
    return {**outcome(target, optimizer), "changed": np.array(any(changed))}


def unprepared(comm: Any) -> dict[str, Any]:
    """Updates by an optimizer that nobody prepared: the first one only spreads weights."""
    import chainermn

    with dtype("mixed16"):
        target = training(norm=no_norm)
        optimizer = chainermn.create_multi_node_optimizer(optimizers.SGD(0.1), comm).setup(target)
        before, error = values(target), ""
        try:
            steps(target, optimizer, comm, [1])
        except RuntimeError as raised:
            error = str(raised)
    changed = [not np.array_equal(before[path], array) for path, array in values(target).items()]
    return {"error": np.array(error), "changed": np.array(any(changed))}


def saved(*objects: Any) -> list[dict[str, Any]]:
    snapshots = []
    for each in objects:
        serializer = DictionarySerializer()
        serializer.save(each)
        # The serializer keeps the arrays themselves.
        snapshots.append({key: np.copy(value) for key, value in serializer.target.items()})
    return snapshots


def resumption(comm: Any, ranks: str) -> dict[str, Any]:
    """Interrupted after two of four steps, and resumed on all ranks or on rank 0 alone."""

    def begin() -> Any:
        target = training("mixed16", norm=no_norm, method="auto", seed=comm.rank, update_per_n_iteration=3)
        return target, prepared(target, comm, optimizers.SGD(0.05))

    with dtype("mixed16"):
        target, optimizer = begin()
        steps(target, optimizer, comm, [1, np.inf])
        snapshots = saved(target, optimizer)
        steps(target, optimizer, comm, [2, 1], seed=55)
        whole = outcome(target, optimizer)
        target, optimizer = begin()
        if ranks == "all" or comm.rank == 0:
            # As Chainer's trainer does, the optimizer first.
            NpzDeserializer(snapshots[1]).load(optimizer)
            NpzDeserializer(snapshots[0]).load(target)
        rng = np.random.default_rng(55)
        if ranks != "all":
            optimizer.update(target, *share(batch(np.random.default_rng(56), BATCH), comm))
        for magnitude in [2, 1]:
            optimizer.update(target, *share(batch(rng, BATCH, magnitude), comm))
        resumed = outcome(target, optimizer)
    if ranks != "all":
        # Chainer spreads no state of optimizers.
        del resumed["steps"], whole["steps"]
    return {**resumed, **{f"whole {name}": array for name, array in whole.items()}}


def one_bad_rank(comm: Any, norm: str, timing: str) -> dict[str, Any]:
    """A batch that is not finite on the last rank: what is logged, and statistics before and after."""
    import chainermn

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("ada_loss").addHandler(handler)

    def make(channels: int) -> chainer.Link:
        if norm == "multi-node":
            return chainermn.links.MultiNodeBatchNormalization(channels, comm)
        return L.BatchNormalization(channels)

    with dtype("mixed16"):
        target = training(norm=make, timing=timing)
        optimizer = prepared(target, comm)
        steps(target, optimizer, comm, [1, 1])
        statistics = target.model.norm
        before = [statistics.avg_mean.copy(), statistics.avg_var.copy()]
        x, t = share(batch(np.random.default_rng(58), BATCH), comm)
        if comm.rank == comm.size - 1:
            x[0] = np.nan
        optimizer.update(target, x, t)
        after = [statistics.avg_mean.copy(), statistics.avg_var.copy()]
        steps(target, optimizer, comm, [1], seed=59)
    logging.getLogger("ada_loss").removeHandler(handler)
    return {
        "before": np.array(before),
        "after": np.array(after),
        "later": np.array([statistics.avg_mean, statistics.avg_var]),
        "reason": np.array([record.getMessage() for record in records]),
        "steps": np.array([optimizer.t, optimizer.entry_scale.skipped]),
    }


def bad_start(comm: Any) -> dict[str, Any]:
    """A bad batch in the first update, which only spreads values."""
    with dtype("mixed16"):
        target = training()
        optimizer = prepared(target, comm)
        x, t = share(batch(np.random.default_rng(58), BATCH), comm)
        optimizer.update(target, x * np.float16(np.nan), t)
    return {"statistics": np.array([target.model.norm.avg_mean, target.model.norm.avg_var])}


METHODS_AND_PRECISIONS = [(method, precision) for precision in ("float32", "mixed16") for method in METHODS]

CASES: dict[str, Any] = {
    **{f"average {m} {p}": lambda comm, m=m, p=p: average(comm, m, p) for m, p in METHODS_AND_PRECISIONS},
    **{
        f"normalization {m} {p}": lambda comm, m=m, p=p: normalization(comm, m, p)
        for m, p in METHODS_AND_PRECISIONS
    },
    **{
        f"average delayed {method} mixed16": lambda comm, method=method: training_of(
            comm, "mixed16", method=method, norm=no_norm, init_scale=4, timing="delayed"
        )
        for method in ("approx_range", "auto")
    },
    **{f"on the wire {m}": lambda comm, m=m: on_the_wire(comm, m) for m in METHODS},
    **{f"branches {fill}": lambda comm, fill=fill: branches(comm, fill) for fill in (True, False)},
    "sharing": sharing,
    "overflow": overflow,
    "divergence": divergence,
}
"""Cases that a single process runs as well."""

SEVERAL: dict[str, Any] = {
    "start": start,
    "unprepared": unprepared,
    "communication": communication,
    "exponents": exponents,
    "statistics": statistics,
    "delayed": delayed,
    "accumulation": accumulation,
    "own timing": own_timing,
    "bad start": bad_start,
    **{
        f"one bad rank, {norm}, {timing}": lambda comm, norm=norm, timing=timing: one_bad_rank(
            comm, norm, timing
        )
        for norm in ("multi-node", "own")
        for timing in TIMINGS
    },
    **{
        f"resumption {ranks}": lambda comm, ranks=ranks: resumption(comm, ranks) for ranks in ("all", "first")
    },
}
"""Cases that only make sense on several ranks."""


def main(folder: str) -> None:
    import chainermn

    comm = chainermn.create_communicator("naive")
    for name, case in {**CASES, **SEVERAL}.items():
        with np.errstate(all="ignore"):
            np.savez(Path(folder, f"{name}.{comm.rank}.npz"), **case(comm))


if __name__ == "__main__":
    main(sys.argv[1])
