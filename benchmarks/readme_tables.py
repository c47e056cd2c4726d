"""Tables in Markdown, and their places in benchmarks/README.md: a section for each benchmark on each kind of
machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that is aligned in plain text too; the first column to the left, the others to the
    right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def write_section(path: Path, title: str, body: str) -> None:
    """Put a section into a file in the place of the one with this title, or where the order of titles has it.

    Sections stand between markers; what is outside stays as it is, and new sections go behind it.
    """
    text = path.read_text(encoding="utf-8")
    section = f"<!-- {title} -->\n### {title}\n\n{body.strip()}\n<!-- end -->\n"
    for found in re.finditer(r"^<!-- (.+) -->\n### \1\n.*?^<!-- end -->\n", text, re.DOTALL | re.MULTILINE):
        if found[1] == title:
            return _write(path, text[: found.start()] + section + text[found.end() :])
        if found[1] > title:
            return _write(path, text[: found.start()] + section + "\n" + text[found.start() :])
    return _write(path, text.rstrip("\n") + "\n\n" + section)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
