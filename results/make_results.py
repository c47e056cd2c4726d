#!/usr/bin/env python3
"""Trains with every loss scaling and several seeds, and writes README.md and pictures; see --help.

It says before it begins how long that will take, and asks. What has ended is kept and not repeated: stop it
and start it again at will. Heavy files (weights, checkpoints) go to runs/, which git ignores; the logs and
results that the tables are made from to a folder named by the scale. The page is written once all runs have
ended.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "ssd"
sys.path[:0] = [str(HERE), str(EXAMPLE), str(EXAMPLE.parent / "common")]

import ada_loss.chainer  # noqa: E402, F401  isort: skip  (before Chainer)
from duration import in_words, seconds_of  # noqa: E402
from experiments import SCALES, Row, Scale, Table  # noqa: E402
from plot import Log, plot, plot_curves  # noqa: E402
from report import readme_text  # noqa: E402

from arguments import FREE_ON_RESUME, parse_settings  # noqa: E402
from command_line import OneSentenceParser, count  # noqa: E402
from errors import DIVERGED, InputError, ends_cleanly  # noqa: E402
from files import write_whole  # noqa: E402

RESULT_FILE, LOG_FILE, PAGE = "result.json", "log.json", "README.md"
# Whose page is that of the folder; others have one in the folder of their records.
DEFAULT_SCALE = "converged"
TRAINING_LENGTH = ("iteration", "step", "lr", "warm_up")
NOT_COMPARED = set(FREE_ON_RESUME) - set(TRAINING_LENGTH) | {"kernels"}


@dataclass(frozen=True)
class Run:
    """A row of a table with a seed.

    Attributes:
        table, row, seed: which one.
        arguments: the command line of train_multi.py, but for where the run writes.
        records: folder for what the tables are made from.
    """

    table: Table
    row: Row
    seed: int
    arguments: tuple[str, ...]
    records: Path

    @property
    def name(self) -> str:
        return f"{self.table.name}/{self.row.name}/seed-{self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What the run's record says; None if it has not ended. InputError if it is of another run."""
        path = self.records / RESULT_FILE
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(parse_settings(self.arguments).as_json()))
        for name in (ours.keys() & result["settings"].keys()) - NOT_COMPARED:
            if ours[name] != result["settings"][name]:
                raise InputError(f"{path} is of a run with other settings ({name}): remove {path.parent}.")
        return result


@ends_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    scale = SCALES[args.scale]
    records = args.folder / args.scale
    runs = list_runs(scale, args.seeds, args.options, records)
    waiting = [run for run in runs if run.result() is None]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs have ended before.", flush=True)
    if waiting and not args.tables_only:
        if not args.yes:
            ask(waiting, args.jobs, args.ranks)
        train_all(waiting, args.folder / "runs" / args.scale, args.jobs, args.ranks)
    write_report(scale, args.scale, runs, args.folder)
    return 0


def ask(waiting: Sequence[Run], jobs: int, ranks: int | None) -> None:
    """Say how long the runs will take. Raises InputError unless the user wants to go on."""
    print("A trial of some iterations tells how long it will take.", flush=True)
    settings = [parse_settings(run.arguments) for run in waiting]
    # The slowest way to train is one of those that scale.
    first = next((run for run in waiting if not run.row.is_baseline), waiting[0])
    seconds = seconds_of(settings, jobs, lambda more: start(first, more, jobs, ranks))
    print(
        f"{len(waiting)} runs, {jobs} at a time, will take about {in_words(seconds)} on this machine.",
        flush=True,
    )
    if not sys.stdin.isatty():
        raise InputError("Nobody is there to ask whether to begin: say so with --yes.")
    if input("Begin? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("Nothing was trained: begin with an answer of y, or with --yes.")


def list_runs(scale: Scale, n_seeds: int, options: Sequence[str], records: Path) -> list[Run]:
    """All runs, seed by seed, so that an early stop leaves whole tables of fewer seeds."""
    return [
        Run(
            table,
            row,
            seed,
            (*scale.flags, *table.flags, *row.flags, "--seed", str(seed), *options),
            records / table.name / row.name / f"seed-{seed}",
        )
        for seed in range(n_seeds)
        for table in scale.tables
        for row in table.rows
    ]


def train_all(runs: Sequence[Run], scratch: Path, jobs: int, ranks: int | None) -> None:
    """Train what has not ended yet, several at a time. Raises InputError if a run can't be trained."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, run, scratch / run.name, jobs, ranks) for run in runs]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                left = (time.monotonic() - began) / done * (len(runs) - done)
                print(f"[{done}/{len(runs)}, {left / 60:.0f} min left] {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train(run: Run, scratch: Path, jobs: int, ranks: int | None) -> str:
    """Train one run, from its newest checkpoint if it was stopped; returns its summary."""
    where = ("--out", str(scratch), "--resume", "auto", "--checkpoint-interval", "250")
    printed = start(run, where, jobs, ranks)
    keep_record(scratch, run.records)
    return f"{run.name}: {printed.strip().splitlines()[-1]}"


def start(run: Run, more: Sequence[str], jobs: int, ranks: int | None) -> str:
    """What train_multi.py prints that trains a run with some more options. InputError if it can't."""
    launcher = [] if ranks is None else [find_mpiexec(), "-n", str(ranks)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    finished = subprocess.run(
        [*launcher, sys.executable, str(EXAMPLE / "train_multi.py"), *run.arguments, *more],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
    )
    if finished.returncode not in (0, DIVERGED):
        last = (finished.stderr.strip() or finished.stdout.strip()).splitlines()[-1:]
        raise InputError(f"{run.name} could not be trained: {' '.join(last).removeprefix('error: ')}")
    return finished.stdout


def find_mpiexec() -> str:
    """The launcher beside this Python, where pip puts it, or else the one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise InputError("--ranks needs mpiexec: install an MPI (pip install mpi4py mpich), or leave it out.")
    return found


def keep_record(scratch: Path, records: Path) -> None:
    """Copy what the tables are made from; the result last, since it marks the run as ended."""
    records.mkdir(parents=True, exist_ok=True)
    rows = json.loads((scratch / LOG_FILE).read_text(encoding="utf-8"))
    lines = ",\n".join(json.dumps({name: _rounded(value) for name, value in row.items()}) for row in rows)
    write_whole(records / LOG_FILE, f"[\n{lines}\n]\n")
    result = json.loads((scratch / RESULT_FILE).read_text(encoding="utf-8"))
    for name in ("out", "dataset_dir", "model_dir"):
        # Where it ran is nobody's business.
        result["settings"][name] = None
    write_whole(records / RESULT_FILE, json.dumps(result, indent=2) + "\n")


def write_report(scale: Scale, name: str, runs: Sequence[Run], folder: Path) -> None:
    """Page and pictures, once all runs have ended; until then of those that have, where git ignores them."""
    results: dict[Table, dict[Row, list[Mapping[str, Any]]]] = {table: {} for table in scale.tables}
    logs: dict[Table, dict[Row, list[Log]]] = {table: {} for table in scale.tables}
    for run in runs:
        result = run.result()
        if result is not None:
            results[run.table].setdefault(run.row, []).append(result)
            log = json.loads((run.records / LOG_FILE).read_text(encoding="utf-8"))
            logs[run.table].setdefault(run.row, []).append(log)
    results = {table: rows for table, rows in results.items() if rows}
    if not results:
        raise InputError(f"No run of the scale {name} has ended yet: leave --tables-only out.")
    n_ended = sum(len(sequence) for rows in results.values() for sequence in rows.values())
    whole = n_ended == len(runs)
    target = folder if name == DEFAULT_SCALE else folder / name
    place = target if whole else folder / "runs" / name
    place.mkdir(parents=True, exist_ok=True)
    plot(place / f"{name}.png", results)
    plot_curves(place / f"{name}-curves.png", {table: logs[table] for table in results})
    write_whole(place / PAGE, readme_text(name, results))
    if not whole:
        print(f"{n_ended} of {len(runs)} runs have ended: {target / PAGE} stays as it is until all have.")
    print(f"Wrote {place / PAGE}, {place / f'{name}.png'} and {place / f'{name}-curves.png'}.")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        description="Train with every loss scaling and several seeds, and write results/README.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Options of train_multi.py for all runs may follow behind --, as in: -- --iteration 2000",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default=DEFAULT_SCALE,
        help="converged on digits and CPU, voc on VOC and GPUs",
    )
    parser.add_argument("--seeds", type=count, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--ranks", type=count, help="MPI ranks of each run; without it there is no MPI")
    parser.add_argument("--tables-only", action="store_true", help="only write the tables of what has ended")
    parser.add_argument("--yes", action="store_true", help="begin without asking")
    parser.add_argument("--folder", type=Path, default=HERE, help="where everything goes")
    parser.add_argument("options", nargs="*", help="options of train_multi.py for all runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
