"""What a snapshot holds of a policy, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ada_loss.core.decision import Decision, Site
from ada_loss.core.entry_scale import EntryScale
from ada_loss.core.range import NOT_WANTED, Range
from ada_loss.core.rules import RULES

VERSION = 2


def to_json(
    iteration: int,
    single_passes: int,
    entry: EntryScale,
    decisions: Iterable[Decision],
    amaxes: Mapping[Site, float],
) -> str:
    """The state that `from_json` reads."""
    state = {
        "version": VERSION,
        "iteration": iteration,
        "single_passes": single_passes,
        "entry": entry.to_state(),
        "decisions": [[*d.site, d.rule.name, d.exponent, d.shift, d.range.to_state()] for d in decisions],
        "amaxes": [[*site, amax] for site, amax in amaxes.items()],
    }
    return json.dumps(state)


def from_json(
    text: str, entry: EntryScale
) -> tuple[int, int, EntryScale, dict[Site, Decision], dict[Site, float]]:
    """The iteration, how many steps of one pass came last, the entry scale, decisions and amaxes.

    Of version 1, which has no number, as well.

    Args:
        text: what `to_json` returned.
        entry: the entry scale with the settings that go on.

    Raises:
        ValueError: it is of another version.
    """
    try:
        state = json.loads(text)
        if "version" not in state:
            state = _upgraded(state)
        if state["version"] != VERSION:
            raise ValueError(f"version {state['version']}")
        decisions = [
            Decision(Site(*place), RULES[method], exponent, shift, Range(*found))
            for *place, method, exponent, shift, found in state["decisions"]
        ]
        amaxes = {Site(*place): amax for *place, amax in state["amaxes"]}
        entry, iteration = entry.restored(state["entry"]), state["iteration"]
        single_passes = state["single_passes"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "The scales in this snapshot are of another version of ada_loss: start afresh, or load it with "
            "that version."
        ) from error
    return iteration, single_passes, entry, {decision.site: decision for decision in decisions}, amaxes


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """A state of version 1, in which a range was four numbers and amaxes of accumulated gradients peaks."""
    decisions = [[*decision, _range(*found)] for *decision, found in state["decisions"]]
    amaxes = [["(accumulation)", *place] for _, *place in state["peaks"]]
    return state | {"version": VERSION, "single_passes": 0, "decisions": decisions, "amaxes": amaxes}


def _range(wanted: float, safe: float, zeros: float, room: float) -> list[Any]:
    if not math.isfinite(safe):
        return Range(zeros=zeros, nothing=safe > 0, unusable=safe < 0).to_state()
    # Nothing was wanted where not even float64 held the smallest product.
    whole = int(wanted) if math.isfinite(wanted) else NOT_WANTED
    return Range(whole, int(safe), int(room), zeros).to_state()
