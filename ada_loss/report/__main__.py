"""Shows what runs have recorded: a page that opens in any browser, pictures, or a table in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ada_loss.core.record_file import RecordError
from ada_loss.report.facts import RunFacts, best_of, load
from ada_loss.report.table import table


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    parser = _Parser(prog="python -m ada_loss.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or its records.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="directory of the page and the pictures (report)"
    )
    parser.add_argument("--text", action="store_true", help="print a table instead, 80 columns wide")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard's files instead")
    parser.add_argument("--no-pictures", action="store_true", help="the page only")
    args = parser.parse_args(argv)
    try:
        runs = load(args.runs)
        if args.text:
            print(_tables(runs))
        elif args.tensorboard:
            _export(runs, args.tensorboard)
        else:
            _write_page(runs, args.out, pictures=not args.no_pictures)
    except RecordError as error:
        print(f"ada_loss.report: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        wanted = (
            "" if args.tensorboard else ' Install it: pip install "ada-loss[report]"; --text needs nothing.'
        )
        print(f"ada_loss.report: {error}{'' if str(error).endswith('.') else '.'}{wanted}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Somebody has seen enough of the table, as with `| head`.
        sys.stderr.close()
    except OSError as error:
        print(f"ada_loss.report: {error}; name another place with --out.", file=sys.stderr)
        return 2
    return 0


def _tables(runs: Sequence[RunFacts]) -> str:
    heads = [
        f"== {run.name} " + "=" * max(2, 76 - len(run.name)) + "\n" if len(runs) > 1 else "" for run in runs
    ]
    return "\n\n".join(head + table(run, runs) for head, run in zip(heads, runs, strict=True))


def _export(runs: Sequence[RunFacts], directory: Path) -> None:
    from ada_loss.report.tensorboard import export

    for run in runs:
        export(run, directory / run.name.replace("/", "-"))
    print(f"Written to {directory}: tensorboard --logdir {directory}")


def _write_page(runs: Sequence[RunFacts], directory: Path, *, pictures: bool) -> None:
    # The table must do without their packages.
    from ada_loss.report.page import charts, make_page, titles
    from ada_loss.report.pictures import write_pictures

    drawn = charts(runs)
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "index.html"
    page.write_text(make_page(runs, drawn), encoding="utf-8")
    written = write_pictures(drawn, titles(runs, drawn), directory) if pictures else []
    print(best_of(runs).sentence)
    also = f", and {len(written)} pictures beside it" if written else ""
    print(f"Open {page}{also}.")


if __name__ == "__main__":
    sys.exit(main())
