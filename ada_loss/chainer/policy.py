"""What a scope decides and remembers: the shift of every decision point, and the entry scale."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ada_loss.chainer import passes
from ada_loss.chainer.branches import FanOut
from ada_loss.chainer.gradient import InFlight, largest_magnitudes
from ada_loss.chainer.recorder import Site
from ada_loss.config import AdaLossConfig
from ada_loss.entry_scale import EntryScale
from ada_loss.measurement import BegunMeasurement, Measurement, begin_measurement, finish
from ada_loss.rules import choose_shift
from ada_loss.statistics import Begun, Statistics, begin

MEETING = "(meeting)"
"""The name of places at which gradients meet, in place of a layer's path."""

_UNDECIDED = -1
"""In place of a back-off: the shift is not that of the measurement yet."""


@dataclass(frozen=True, slots=True)
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
        self._peaks: dict[Site, float] = {}
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
    ) -> Decision:
        """The shift at a site, and why, for the output gradient `gy` (array) that carries `exponent`.

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
                return self._decide(site, config, finish([begun])[0], exponent)
        if (known.exponent, known.backoff) == (exponent, self.entry.backoff):
            return known
        return self._decide(site, config, known.measurement.scaled(exponent - known.exponent), exponent)

    def peaks(self, gradients: Sequence[InFlight]) -> list[float]:
        """The largest magnitudes of gradients that meet in a backward pass.

        With delayed timing they follow from those that met in the step before; meetings are told apart by
        their order.
        """
        if self.config.timing == "current":
            return largest_magnitudes(gradients)
        self._calls[MEETING] += 1
        sites = [Site(MEETING, self._calls[MEETING], operand) for operand in range(len(gradients))]
        self._met.update(sites)
        if not all(site in self._peaks for site in sites):
            found = largest_magnitudes(gradients)
            for site, peak, (_, exponent) in zip(sites, found, gradients, strict=True):
                self._peaks[site] = math.ldexp(peak, -exponent)
            return found
        for site, (array, exponent) in zip(sites, gradients, strict=True):
            self._begun[site] = exponent, BegunMeasurement(begin(array), None, 1, None)
        return [math.ldexp(self._peaks[site], g.exponent) for site, g in zip(sites, gradients, strict=True)]

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
            if not measurement.finite:
                continue
            if known is not None:
                measurement = measurement.scaled(known.exponent)
                self.decisions[site] = replace(known, backoff=_UNDECIDED, measurement=measurement)
            elif site in self._peaks:
                self._peaks[site] = measurement.gradient.largest

    def end_step(self, *, finite: bool) -> None:
        """Close a step: the optimizer has updated, or skipped because a gradient was not finite."""
        self.entry = self.entry.after(finite=finite)
        self.iteration += 1
        # Sites that do not come up any more would pile up.
        self.decisions = {site: decision for site, decision in self.decisions.items() if site in self._met}
        self._peaks = {site: peak for site, peak in self._peaks.items() if site in self._met}
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
        state = {
            "iteration": self.iteration,
            "entry": self.entry.to_state(),
            "decisions": decisions,
            "peaks": [[*site, peak] for site, peak in self._peaks.items()],
        }
        return json.dumps(state)

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
        self._peaks = {Site(path, call, operand): peak for path, call, operand, peak in state["peaks"]}
        self._begun.clear()
        self._weights.clear()
        self._calls.clear()

    def reset(self) -> None:
        """Start afresh, as after construction."""
        self.__init__(self.config, self.layers)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # What has been begun is begun on these very arrays, and not on their copies.
        return vars(self) | {"_begun": {}, "_weights": {}}

    def _decide(self, site: Site, config: AdaLossConfig, measurement: Measurement, exponent: int) -> Decision:
        backoff = self.entry.backoff
        shift = choose_shift(config, measurement, exponent, backoff=backoff)
        decision = Decision(site, exponent, backoff, shift, measurement)
        if measurement.finite:
            self.decisions[site] = decision
        return decision

    def _begin_weight(self, weight: Any, *, smallest: bool) -> Begun[Statistics]:
        """Statistics of a parameter, computed once in a step."""
        # The array is kept, so that no other one gets its id.
        key = id(weight), smallest
        if key not in self._weights:
            self._weights[key] = weight, begin(weight, smallest=smallest)
        return self._weights[key][1]
