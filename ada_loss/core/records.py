"""What a run records, as frozen dataclasses, and their form in JSON; docs/records.md describes every field.

One record is one line. A run is a header, then for each sampled step one record a place and one of the step
itself, and at the end how it ended. `record_file` writes and reads such files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ada_loss.core.histogram import Histogram

VERSION = 1
"""Of the form of the records; a reader refuses later ones."""

ACTIVATION, INPUT_GRADIENT, WEIGHT_GRADIENT, BIAS_GRADIENT = KINDS = (
    "activation",
    "input gradient",
    "weight gradient",
    "bias gradient",
)
"""What is looked at in a place: on the forward pass a result, on the backward pass gradients."""


class Place(NamedTuple):
    """Where in a model something was measured.

    path: of the module for a result or an input gradient, of the parameter for its gradient. kind: one of
    `KINDS`.
    """

    path: str
    kind: str

    @property
    def layer(self) -> str:
        """The path of the module."""
        if self.kind not in (WEIGHT_GRADIENT, BIAS_GRADIENT):
            return self.path
        cut = max(self.path.rfind("/"), self.path.rfind("."))
        return self.path[:cut] if cut > 0 else "/"

    @property
    def direction(self) -> str:
        """The pass on which it is computed: forward or backward."""
        return "forward" if self.kind == ACTIVATION else "backward"

    def __str__(self) -> str:
        return f"{self.path} ({self.kind})"


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What a run is.

    name: what to call it beside others. method: how it scales its loss or its gradients. adaptive: whether
    places have scales of their own. model: the class or the path of the model. framework: Chainer or PyTorch.
    every: from how many steps one is sampled. settings, versions: of the method, of the packages. total: how
    many steps are planned, if known. started: the time, as ISO 8601 writes it.
    """

    name: str
    method: str
    model: str = ""
    framework: str = ""
    adaptive: bool = False
    every: int = 1
    number_format: str = "float16"
    total: int | None = None
    started: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shift:
    """A shift as it was chosen, all in powers of two; None where the rule had nothing to choose from.

    wanted: at which hardly any element underflows. safe: the largest at which none overflows. bounded: what
    the rule and its bounds make of these. used: what the gradient was really computed with.
    """

    wanted: int | None = None
    safe: int | None = None
    bounded: int | None = None
    used: int | None = None


UNSHIFTED = Shift()
"""Of places at which no shift is chosen."""


@dataclass(frozen=True)
class PlaceRecord:
    """What a place held in one step.

    histogram: the true values of this run. exponent: what the array carried. lost: how many elements are
    zero here though float32 has them non-zero; None if that was not measured. reference: the histogram of
    the same values in float32, where they were computed.
    """

    step: int
    place: Place
    histogram: Histogram
    exponent: int = 0
    shift: Shift = UNSHIFTED
    lost: int | None = None
    reference: Histogram | None = None

    @property
    def finite(self) -> bool:
        """Whether every element was."""
        return not self.histogram.nonfinite


@dataclass(frozen=True)
class StepRecord:
    """What became of one step.

    loss: the true loss; None if unknown or not finite. exponent: of the scale at which gradients enter.
    skipped: whether it was left out because of an overflow. skipped_so_far: how many were, this one included.
    began: the first place that was not finite. metrics: accuracy, mAP and the like, by name.
    """

    step: int
    loss: float | None = None
    exponent: int = 0
    skipped: bool = False
    skipped_so_far: int = 0
    began: Place | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EndRecord:
    """How a run ended: `outcome` is one word, such as finished or diverged."""

    step: int
    outcome: str = "finished"


Record = RunHeader | PlaceRecord | StepRecord | EndRecord


def to_line(record: Record) -> str:
    """A record as one line of JSON, the newline included. What is not finite is written as null."""
    return json.dumps(_to_json(record), separators=(",", ":"), allow_nan=False, default=_plain) + "\n"


def from_line(line: str | bytes) -> Record | None:
    """The record of a line; None if it is of a kind that this version does not know.

    Raises:
        ValueError: where the line is no record at all, or one of a later version.
    """
    try:
        fields = json.loads(line)
        kind = fields.pop("record")
        return _READERS[kind](fields) if kind in _READERS else None
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("This line is no record of ada_loss.") from error


def _to_json(record: Record) -> dict[str, Any]:
    if isinstance(record, PlaceRecord):
        return {
            "record": "place",
            "step": record.step,
            "place": record.place.path,
            "kind": record.place.kind,
            **_histogram_to_json(record.histogram),
            "exponent": record.exponent,
            **{name: _finite(value) for name, value in asdict(record.shift).items()},
            "lost": record.lost,
            "reference": record.reference and _histogram_to_json(record.reference),
        }
    if isinstance(record, StepRecord):
        metrics = {name: _finite(value) for name, value in record.metrics.items()}
        return {"record": "step", **vars(record), "loss": _finite(record.loss), "metrics": metrics}
    if isinstance(record, EndRecord):
        return {"record": "end", **vars(record)}
    return {"record": "run", "version": VERSION, **vars(record)}


def _histogram_to_json(histogram: Histogram) -> dict[str, Any]:
    return vars(histogram)


def _histogram_from_json(fields: dict[str, Any]) -> Histogram:
    return Histogram(
        int(fields.pop("lowest")),
        tuple(map(int, fields.pop("counts"))),
        int(fields.pop("zeros")),
        int(fields.pop("nonfinite")),
        float(fields.pop("largest")),
    )


def _place_from_json(fields: dict[str, Any]) -> PlaceRecord:
    reference = fields["reference"]
    return PlaceRecord(
        int(fields["step"]),
        Place(str(fields["place"]), str(fields["kind"])),
        _histogram_from_json(fields),
        int(fields["exponent"]),
        Shift(*(fields[name] for name in ("wanted", "safe", "bounded", "used"))),
        fields["lost"],
        None if reference is None else _histogram_from_json(reference),
    )


def _step_from_json(fields: dict[str, Any]) -> StepRecord:
    began = fields.pop("began")
    metrics = {name: value for name, value in fields.pop("metrics").items() if value is not None}
    return StepRecord(**fields, began=None if began is None else Place(*began), metrics=metrics)


def _run_from_json(fields: dict[str, Any]) -> RunHeader:
    version = fields.pop("version")
    if version > VERSION:
        raise ValueError(
            f"These records are of version {version}, and this ada_loss reads up to {VERSION}: update it."
        )
    return RunHeader(**fields)


_READERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "run": _run_from_json,
    "place": _place_from_json,
    "step": _step_from_json,
    "end": lambda fields: EndRecord(**fields),
}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A number of an array library as Python's own, anything else by its name, so that settings of any kind
    can be written."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
