"""`python -m ada_loss check MODULE:CALLABLE`: what float16 would do to a model, before it is trained."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import ada_loss


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


class InputError(ValueError):
    """What the user named is not there or not what it should be; the message says so in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = _Parser(prog="python -m ada_loss", description="Adaptive loss scaling.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check")
    command = commands.add_parser(
        "check",
        help="whether float16 would lose gradients of a model, and what helps",
        description="Computes a step of a model in float32 and in float16, on random input unless given, and "
        "prints for each layer which scales suit it, what would be lost, and what to use.",
    )
    command.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="returns a model, or a tuple (model, batch) or (model, batch, loss); Chainer or PyTorch",
    )
    command.add_argument("--steps", type=int, default=1, help="how many times to compute it (1)")
    args = parser.parse_args(argv)
    try:
        print(ada_loss.check(*_made(args.model), steps=args.steps))
    except (InputError, TypeError, ValueError) as error:
        print(f"ada_loss check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"ada_loss check: {error}: install it, or run this where it is installed.", file=sys.stderr)
        return 2
    return 0


def _made(name: str) -> tuple[Any, ...]:
    """Model, batch and loss, as far as what is named returns them.

    Raises:
        InputError: there is nothing of that name, or it does not return what it should.
    """
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise InputError(f"{name!r} names no callable: write MODULE:CALLABLE, such as models:make_model.")
    # As `python -m` has it for its own modules.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"There is no module {error.name}: run this where it can be imported.") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{module_name} has no {path}: name a function that returns a model.")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is no callable: name a function that returns a model.")
    if not _is_model(found):
        try:
            found = found()
        except Exception as error:
            raise InputError(f"{name} raised {type(error).__name__}: {error}") from error
    made = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(made) <= 3:
        raise InputError(
            f"{name} returned {len(made)} things: return a model, its batch and its loss at most."
        )
    return made


def _is_model(value: Any) -> bool:
    """Whether a callable is a model itself."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(value).__mro__}
    return bool(names & {"chainer.link.Link", "torch.nn.modules.module.Module"})


if __name__ == "__main__":
    sys.exit(main())
