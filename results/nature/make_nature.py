#!/usr/bin/env python3
"""Trains what is on this page with every loss scaling, and writes README.md and nature.png.

Runs that are in the folder runs/ are not repeated: stop it and start it again at will.
"""

from __future__ import annotations

import ada_loss.chainer as ada  # isort: skip  (has to come before Chainer)

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import Method, all_methods, some_methods, train
from nature_page import page, picture
from networks import ADVERSARIAL, DEEP, DENOISING, SEGMENTATION
from problems import Training
from regressions import BEAM, DEFLECTION, NUCLEI

HERE = Path(__file__).resolve().parent
RUNS, PAGE, PICTURE = HERE / "runs", HERE / "README.md", HERE / "nature.png"
SEPARATED = (BEAM, NUCLEI)
OTHERS = (DEFLECTION, DENOISING, DEEP, ADVERSARIAL, SEGMENTATION)
SEEDS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [training.name for training in (*SEPARATED, *OTHERS)]
    parser.add_argument("--only", choices=names, help="run this training alone; the page is of all that ran")
    parser.add_argument("--kernels", choices=ada.kernels.PROVIDERS, default="auto", help="who computes")
    options = parser.parse_args(argv)
    # A line for each skipped step would hide the rest.
    logging.disable(logging.WARNING)
    RUNS.mkdir(exist_ok=True)
    with ada.kernels.using(options.kernels):
        for training in (*SEPARATED, *OTHERS):
            if options.only in (None, training.name):
                methods = all_methods(training) if training in SEPARATED else some_methods(training)
                for seed in SEEDS:
                    for method in methods:
                        run_once(training, method, seed)
    runs = read_runs(RUNS)
    PAGE.write_text(page(SEPARATED, OTHERS, runs), encoding="utf-8")
    picture(PICTURE, SEPARATED, runs)
    print(f"{len(runs)} runs | {PAGE} | {PICTURE}")
    return 0


def run_once(training: Training, method: Method, seed: int) -> None:
    path = RUNS / f"{training.name}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    if any(run["method"] == method.name and run["seed"] == seed for run in runs):
        return
    run = train(training, method, seed)
    runs.append(run)
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    partial.replace(path)
    print(
        f"{training.name} | {method.name} | seed {seed} | error {run['error']} | {run['seconds']} s",
        flush=True,
    )


def read_runs(folder: Path) -> list[dict[str, Any]]:
    return [run for path in sorted(folder.glob("*.json")) for run in json.loads(path.read_text())]


if __name__ == "__main__":
    sys.exit(main())
