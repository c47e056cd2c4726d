"""Decisions as a table that people read."""

from __future__ import annotations

from collections.abc import Iterable

from ada_loss.core.decision import Decision

HEADINGS = ("layer", "rule", "calls", "arrives", "shift", "leaves", "zeros")

LEGEND = (
    "arrives, leaves: log2 of the scale of the layer's output gradient and input gradient; shift: what the\n"
    "layer added; zeros: share of the output gradient's elements that are zero. Over several calls: from, to."
)


def decision_table(decisions: Iterable[Decision]) -> str:
    """A row for each layer, in the order in which backward met them; repeated calls are one row.

    Args:
        decisions: the latest of every decision point.

    Returns:
        The lines of the table and of `LEGEND`, joined.
    """
    by_layer: dict[str, list[Decision]] = {}
    for decision in decisions:
        by_layer.setdefault(decision.site.path, []).append(decision)
    rows = [HEADINGS, *(_row(path, found) for path, found in by_layer.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join((*names, *numbers)))
    return "\n".join((*lines, LEGEND))


def _row(path: str, decisions: list[Decision]) -> tuple[str, ...]:
    return (
        path,
        ", ".join(dict.fromkeys(decision.rule.name for decision in decisions)),
        str(len(decisions)),
        _span([decision.exponent for decision in decisions]),
        _span([decision.shift for decision in decisions]),
        _span([decision.exponent + decision.shift for decision in decisions]),
        f"{max(decision.range.zeros for decision in decisions):.2f}",
    )


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}, {high}"
