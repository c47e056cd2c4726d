"""What a scope decides and remembers: the shift of every decision point, and the entry scale."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ada_loss.chainer import passes
from ada_loss.chainer.branches import FanOut
from ada_loss.chainer.recorder import Site
from ada_loss.config import AdaLossConfig
from ada_loss.entry_scale import EntryScale
from ada_loss.rules import Measurement, choose_shift, measure


@dataclass(frozen=True)
class Decision:
    """A shift as it was last chosen. exponent: what the gradient carried when it arrived."""

    site: Site
    exponent: int
    shift: int
    measurement: Measurement


class ShiftPolicy:
    """Chooses shifts by the configured rule, anew every `update_per_n_iteration` iterations.

    config: settings of the scope. layers: settings of links that a filter refused, by path.
    """

    def __init__(self, config: AdaLossConfig, layers: dict[str, AdaLossConfig]) -> None:
        self.config = config
        self.layers = layers
        self.entry = EntryScale.from_config(config)
        self.iteration = 0
        self.decisions: dict[Site, Decision] = {}
        self.branches: tuple[FanOut, ...] | None = None
        self._shifts: dict[Site, int] = {}
        self._calls: Counter[str] = Counter()
        self._met: set[Site] = set()

    def next_call(self, path: str) -> int:
        """How often `path` has been asked for in this step."""
        if self._met and not passes.running():
            # A backward pass has been since: without a prepared optimizer nobody says that a step ended.
            self.begin_step()
        self._calls[path] += 1
        return self._calls[path] - 1

    def choose(
        self,
        site: Site,
        gy: Any,
        exponent: int,
        weight: Any = None,
        fan: int = 1,
        channel_axis: int | None = 0,
        *,
        config: AdaLossConfig | None = None,
    ) -> int:
        """The shift at a site for the output gradient `gy` (array) that carries `exponent`.

        weight, fan, channel_axis: see `ada_loss.rules.measure`; no weight at a cast. config: the site's own
        settings.
        """
        self._met.add(site)
        config = self.settings(site, config)
        due = self.iteration % config.update_per_n_iteration == 0
        if not due and site in self._shifts:
            return self._shifts[site]
        measurement = measure(config, gy, weight, fan, channel_axis=channel_axis)
        shift = choose_shift(config, measurement, exponent, backoff=self.entry.backoff)
        if measurement.finite:
            self._shifts[site] = shift
            self.decisions[site] = Decision(site, exponent, shift, measurement)
        return shift

    def settings(self, site: Site, own: AdaLossConfig | None = None) -> AdaLossConfig:
        """The settings at a site; own: those of the site itself, if it has any."""
        return own or self.layers.get(site.path, self.config)

    def end_step(self, *, finite: bool) -> None:
        """Close a step: the optimizer has updated, or skipped because a gradient was not finite."""
        self.entry = self.entry.after(finite=finite)
        self.iteration += 1
        # Sites that do not come up any more would pile up.
        self._shifts = {site: shift for site, shift in self._shifts.items() if site in self._met}
        self.decisions = {site: decision for site, decision in self.decisions.items() if site in self._met}
        self.begin_step()

    def begin_step(self) -> None:
        """Count the applications of each layer from zero again."""
        self._calls.clear()
        self._met.clear()

    def to_json(self) -> str:
        """Everything that decides the next step."""
        shifts = [[*site, shift] for site, shift in self._shifts.items()]
        return json.dumps({"iteration": self.iteration, "entry": self.entry.to_state(), "shifts": shifts})

    def load_json(self, text: str) -> None:
        """Continue from what `to_json` returned."""
        state = json.loads(text)
        self.iteration = state["iteration"]
        self.entry = self.entry.restored(state["entry"])
        self._shifts = {Site(path, call, operand): shift for path, call, operand, shift in state["shifts"]}
        self.decisions.clear()
        self._calls.clear()

    def reset(self) -> None:
        """Start afresh, as after construction."""
        self.__init__(self.config, self.layers)  # type: ignore[misc]
