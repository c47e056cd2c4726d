"""What the speed benchmarks' command lines have in common, and where their results go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from fidelity_cases import use_ssd_example
from machine import Machine, this_machine
from readme_tables import README, write_section

from ada_loss.chainer import kernels

use_ssd_example()

from threads import use_half_of_the_cores  # noqa: E402

SLOW = ("ssd300",)
"""Models that `--quick` leaves out unless they are named."""


@dataclass
class Report:
    """What a benchmark found, printed as it comes.

    benchmark: its name. machine: what it ran on.
    """

    benchmark: str
    machine: Machine
    _parts: list[str] = field(default_factory=list)

    def add(self, part: str) -> None:
        print(part, end="\n\n", flush=True)
        self._parts.append(part)

    def write(self) -> None:
        """Into benchmarks/README.md."""
        title = f"{self.benchmark}, {kernels.current()} kernels, {self.machine.name}"
        write_section(README, title, "\n\n".join(self._parts))
        print(f"written to {README}")


def parser(description: str, models: Iterable[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    made = argparse.ArgumentParser(
        description=description,
        epilog="Whole runs write their tables to benchmarks/README.md; --quick and --models only print.",
    )
    made.add_argument(
        "--quick", action="store_true", help="a short run on small batches to see that it works"
    )
    made.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    made.add_argument("--kernels", choices=kernels.PROVIDERS, default="auto", help="(default: %(default)s)")
    if models:
        made.add_argument("--models", nargs="+", choices=list(models), help="only these (default: all)")
    return made


def time_models(
    benchmark: str,
    description: str,
    models: Collection[str],
    seconds: float,
    measure: Callable[[str, Machine, argparse.Namespace], str],
) -> None:
    """A whole program that times models one after the other.

    seconds: what `--seconds` is if it is not given. measure: times the model of a name on a machine, with the
    options of the command line; returns what to report.
    """
    made = parser(description, models)
    made.add_argument(
        "--seconds", type=float, default=seconds, help="for each model, about (default: %(default)s)"
    )
    options = made.parse_args()
    report = start(benchmark, options)
    for name in chosen(options, models):
        report.add(measure(name, report.machine, options))
    if not options.quick and not options.models:
        report.write()


def chosen(options: argparse.Namespace, models: Iterable[str]) -> list[str]:
    """The models to measure, in order."""
    return options.models or [name for name in models if name not in SLOW or not options.quick]


def start(benchmark: str, options: argparse.Namespace) -> Report:
    """Choose the kernels, look at the machine and begin the report."""
    use_half_of_the_cores()
    try:
        kernels.use(options.kernels)
    except ImportError as error:
        fail(str(error))
    machine = this_machine()
    report = Report(benchmark, machine)
    report.add(machine.line)
    return report


def fail(message: str) -> NoReturn:
    """End with a sentence for the user."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
