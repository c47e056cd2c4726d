"""How long a mixed16 training iteration takes, as a multiple of plain Chainer's float32 iteration.

    python3 benchmarks/mixed16_ratio.py [--model small|ssd300] [--kernels numpy|torch|auto]

All models start from the same weights and take turns, one iteration each per round and in an order drawn
anew for each, on fresh random data: a noisy machine disturbs them alike. Iteration means forward, loss,
backward and update.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "ssd")]

import ada_loss.chainer as ada  # noqa: E402  (has to come before Chainer)

import chainer  # noqa: E402  # isort: skip

from chainercv.links.model.ssd import SSD  # noqa: E402

from ada_loss.chainer import kernels  # noqa: E402
from loss import MultiboxLoss  # noqa: E402
from models import MODELS, build_model  # noqa: E402
from optimization import make_optimizer  # noqa: E402
from training import TrainChain  # noqa: E402

N_CLASSES = 10
POSITIVES = 0.02
LEARNING_RATE = 1e-4
"""Small enough that random data does not drive the weights anywhere."""

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    options = arguments()
    rng = np.random.default_rng(options.seed)
    runs = {
        "float32, chainer": iteration("float32", None, "chainer", options),
        "mixed16, fixed": iteration("mixed16", "fixed", options.kernels, options),
        "mixed16, approx_range": iteration("mixed16", "approx_range", options.kernels, options),
    }
    model = build_model(options.model, N_CLASSES, "lecun-uniform", options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.warm_up + options.rounds):
        batch = random_batch(rng, options.batchsize, model)
        for name in rng.permutation(list(runs)):
            started = time.perf_counter()
            runs[name](batch)
            if turn >= options.warm_up:
                seconds[name].append(time.perf_counter() - started)
    report(seconds, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="small")
    parser.add_argument("--kernels", choices=kernels.PROVIDERS, default="numpy", help="of the mixed16 runs")
    parser.add_argument("--batchsize", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="measured iterations of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.batchsize, options.rounds) < 1 or options.warm_up < 0:
        parser.error("--batchsize and --rounds have to be at least 1 and --warm-up at least 0.")
    return options


def iteration(
    dtype: str, method: str | None, provider: str, options: argparse.Namespace
) -> Callable[[Batch], None]:
    """A training iteration of a fresh model on a batch, under these kernels and this loss scaling."""
    config = chainer.mixed16 if dtype == "mixed16" else np.float32
    with chainer.using_config("dtype", config):
        model = build_model(options.model, N_CLASSES, "lecun-uniform", options.seed)
    chain = TrainChain(
        model if method is None else ada.AdaLossScaled(model, loss_scale_method=method), MultiboxLoss(), 1
    )
    optimizer = make_optimizer(chain, 1)
    optimizer.lr = LEARNING_RATE
    if method is not None:
        optimizer = ada.prepare(optimizer)

    def run(batch: Batch) -> None:
        with chainer.using_config("dtype", config), kernels.using(provider):
            optimizer.update(chain, *batch)

    return run


def random_batch(rng: np.random.Generator, size: int, model: SSD) -> Batch:
    """Images (B, 3, insize, insize) as if preprocessed, offsets (B, K, 4) and labels (B, K)."""
    n_boxes = len(model.coder._default_bbox)
    images = rng.uniform(-128, 128, (size, 3, model.insize, model.insize)).astype(np.float32)
    offsets = rng.standard_normal((size, n_boxes, 4)).astype(np.float32)
    labels = rng.integers(1, N_CLASSES + 1, (size, n_boxes)) * (rng.random((size, n_boxes)) < POSITIVES)
    return images, offsets, labels.astype(np.int32)


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    baseline = np.array(seconds["float32, chainer"])
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(
        f"{options.model} SSD, batch {options.batchsize}, {options.kernels} kernels, {options.rounds} rounds"
    )
    print(
        f"{processor()}, {os.cpu_count()} cores, {threads} BLAS threads, "
        f"Python {platform.python_version()}, NumPy {np.__version__}"
    )
    print(f"{'run':24}{'s/iteration':>12}{'ratio':>8}   quartiles of the ratio")
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.array(times) / baseline, [25, 50, 75])
        print(f"{name:24}{np.median(times):12.3f}{middle:8.2f}   {low:.2f} to {high:.2f}")


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
