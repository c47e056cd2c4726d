"""What the command lines of the scripts share: types of values, and errors in one sentence."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from errors import BAD_INPUT, launched_rank


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that there are; None stands for none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class OneSentenceParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, once, however many ranks read the same command line."""

    def error(self, message: str) -> NoReturn:
        if launched_rank() == 0:
            print(f"error: {message.rstrip('.')}; see --help.", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)

    def given(self, argv: Sequence[str] | None) -> set[str]:
        """Names of the options that a command line sets. The parser forgets its defaults."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        return set(vars(self.parse_args(argv)))


class Former(argparse.Action):
    """A flag of the paper's own code, answered by what to write here."""

    def __init__(self, option_strings: Sequence[str], dest: str, advice: str) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self._advice = advice

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, flag: str | None = None
    ) -> None:
        parser.error(f"{flag} is a flag of the paper's code: {self._advice}")


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def checked(
    convert: Callable[[str], Any], accept: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """A type for argparse that takes some values only."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, OverflowError):
            accepted = False
        else:
            accepted = accept(value)
        if not accepted:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def _number(text: str) -> float:
    """Also of powers of two as one would write them, 2**-12."""
    return 2.0 ** int(text[3:]) if text.startswith("2**") else float(text)


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else _number(text)


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _anything(value: object) -> bool:
    return True


whole_number = checked(int, _anything, "a whole number")
count = checked(int, lambda value: value >= 1, "a whole number of at least 1")
count_or_zero = checked(int, lambda value: value >= 0, "a whole number of at least 0")
number = checked(_number, _anything, "a number")
number_or_none = checked(_number_or_none, _anything, "a number or none")
share = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive = checked(float, _is_positive, "a positive number")
power_of_two = checked(
    _number,
    lambda value: _is_positive(value) and math.frexp(value)[0] == 0.5,
    "a power of two such as 0.5 or 2**-12",
)
device = checked(
    str,
    lambda text: text in ("auto", "cpu", "gpu") or text.isdecimal(),
    "auto, cpu, gpu or the number of a GPU",
)
