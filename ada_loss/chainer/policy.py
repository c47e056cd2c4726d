"""What a scope decides and remembers: the shift of every decision point, and the entry scale."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ada_loss.chainer import passes
from ada_loss.chainer.branches import FanOut
from ada_loss.chainer.recorder import Site
from ada_loss.config import AdaLossConfig
from ada_loss.entry_scale import EntryScale
from ada_loss.measurement import BegunMeasurement, Measurement, begin_measurement, finish
from ada_loss.rules import choose_shift
from ada_loss.statistics import Begun, Statistics, begin

_UNDECIDED = -1
"""In place of a back-off: the shift is not that of the measurement yet."""


@dataclass(frozen=True)
class Decision:
    """A shift as it was last chosen, for a gradient that carried `exponent`.

    backoff: of the entry scale at that time. measurement: of such a gradient, when one was last measured.
    """

    site: Site
    exponent: int
    backoff: int
    shift: int
    measurement: Measurement


Measurements = dict[Site, Measurement]
"""Of true gradients, by where they arrive."""


class ShiftPolicy:
    """Chooses shifts by the configured rule, from what is measured every `update_per_n_iteration` iterations.

    In between, and with delayed timing, what was measured last stands for what arrives.

    config: settings of the scope. layers: settings of links that a filter refused, by path.
    """

    def __init__(self, config: AdaLossConfig, layers: dict[str, AdaLossConfig]) -> None:
        self.config = config
        self.layers = layers
        self.entry = EntryScale.from_config(config)
        self.iteration = 0
        self.decisions: dict[Site, Decision] = {}
        self.branches: tuple[FanOut, ...] | None = None
        self._begun: dict[Site, tuple[int, BegunMeasurement]] = {}
        self._weights: dict[tuple[int, bool], tuple[Any, Begun[Statistics]]] = {}
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
        parameter: bool = False,
    ) -> int:
        """The shift at a site for the output gradient `gy` (array) that carries `exponent`.

        weight, fan, channel_axis: see `ada_loss.measurement`; no weight at a cast. config: the site's own
        settings. parameter: whether `weight` is the array of a parameter, which is the same for a whole step.
        """
        self._met.add(site)
        config = self.settings(site, config)
        known = self.decisions.get(site)
        if known is None or self.iteration % config.update_per_n_iteration == 0:
            summarize = self._begin_weight if parameter else begin
            begun = begin_measurement(config, gy, weight, fan, channel_axis, summarize)
            if known is not None and config.timing == "delayed":
                self._begun[site] = exponent, begun
            else:
                (measurement,) = finish([begun])
                if not measurement.finite:
                    return 0
                return self._decide(site, config, measurement, exponent)
        if (known.exponent, known.backoff) == (exponent, self.entry.backoff):
            return known.shift
        return self._decide(site, config, known.measurement.scaled(exponent - known.exponent), exponent)

    def settings(self, site: Site, own: AdaLossConfig | None = None) -> AdaLossConfig:
        """The settings at a site; own: those of the site itself, if it has any."""
        return own or self.layers.get(site.path, self.config)

    def learn(self, agree: Callable[[Measurements], Measurements] | None = None) -> None:
        """Let the next decisions follow from what has been begun to measure, with one transfer from a GPU.

        agree: makes of this process's measurements those of all.
        """
        begun, self._begun = self._begun, {}
        exponents = [exponent for exponent, _ in begun.values()]
        found = finish([measurement for _, measurement in begun.values()])
        learned = {
            site: measurement.scaled(-exponent)
            for site, exponent, measurement in zip(begun, exponents, found, strict=True)
        }
        for site, measurement in (agree(learned) if agree else learned).items():
            known = self.decisions.get(site)
            if known is not None and measurement.finite:
                measurement = measurement.scaled(known.exponent)
                self.decisions[site] = replace(known, backoff=_UNDECIDED, measurement=measurement)

    def end_step(self, *, finite: bool) -> None:
        """Close a step: the optimizer has updated, or skipped because a gradient was not finite."""
        self.entry = self.entry.after(finite=finite)
        self.iteration += 1
        # Sites that do not come up any more would pile up.
        self.decisions = {site: decision for site, decision in self.decisions.items() if site in self._met}
        self.begin_step()

    def begin_step(self) -> None:
        """Count the applications of each layer from zero again."""
        self.learn()
        self._weights.clear()
        self._calls.clear()
        self._met.clear()

    def to_json(self) -> str:
        """Everything that decides the next step."""
        decisions = [
            [*d.site, d.exponent, d.backoff, d.shift, d.measurement.to_state()]
            for d in self.decisions.values()
        ]
        return json.dumps(
            {"iteration": self.iteration, "entry": self.entry.to_state(), "decisions": decisions}
        )

    def load_json(self, text: str) -> None:
        """Continue from what `to_json` returned."""
        state = json.loads(text)
        self.iteration = state["iteration"]
        self.entry = self.entry.restored(state["entry"])
        decisions = [
            Decision(Site(path, call, operand), exponent, backoff, shift, Measurement.from_state(measurement))
            for path, call, operand, exponent, backoff, shift, measurement in state["decisions"]
        ]
        self.decisions = {decision.site: decision for decision in decisions}
        self._begun.clear()
        self._weights.clear()
        self._calls.clear()

    def reset(self) -> None:
        """Start afresh, as after construction."""
        self.__init__(self.config, self.layers)  # type: ignore[misc]

    def _decide(self, site: Site, config: AdaLossConfig, measurement: Measurement, exponent: int) -> int:
        backoff = self.entry.backoff
        shift = choose_shift(config, measurement, exponent, backoff=backoff)
        self.decisions[site] = Decision(site, exponent, backoff, shift, measurement)
        return shift

    def _begin_weight(self, weight: Any, *, smallest: bool) -> Begun[Statistics]:
        """Statistics of a parameter, computed once in a step."""
        # The array is kept, so that no other one gets its id.
        key = id(weight), smallest
        if key not in self._weights:
            self._weights[key] = weight, begin(weight, smallest=smallest)
        return self._weights[key][1]
