"""What a scope decides and remembers: the shift of every decision point, and the entry scale."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ada_loss.chainer import passes
from ada_loss.chainer.branches import FanOut
from ada_loss.chainer.gradient import HEADROOM, InFlight, Meeting, largest_magnitudes
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

    method: the rule. backoff: of the entry scale at that time. measurement: of such a gradient, when one was
    last measured.
    """

    site: Site
    method: str
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

    shared = False
    """Whether other processes have such a policy too, so that one only learns when all do."""

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
        if not passes.running():
            self.clear()
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
        if known is not None and known.method != config.loss_scale_method:
            known = None
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

    def meeting(self) -> Meeting:
        """What is known of gradients that meet in a backward pass, as all do in the same order in every step.

        With delayed timing their sizes follow from those that met there in the step before.
        """
        self._calls[MEETING] += 1
        current = self.config.timing == "current"
        peaks = largest_magnitudes if current else partial(self._known_peaks, self._calls[MEETING])
        return Meeting(peaks, HEADROOM + self.entry.backoff)

    def _known_peaks(self, number: int, gradients: Sequence[InFlight]) -> list[float]:
        sites = [Site(MEETING, number, operand) for operand in range(len(gradients))]
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

    def clear(self) -> None:
        """Begin a step if a backward pass has been: without a prepared optimizer nobody says that one ended.

        Gradients may also be cleared between forward and backward, where F.forget will go on counting.
        """
        if self._met:
            self.begin_step()

    def begin_step(self) -> None:
        """Count the applications of each layer from zero again."""
        if not self.shared:
            self.learn()
        self._weights.clear()
        self._calls.clear()
        self._met.clear()

    def to_json(self) -> str:
        """Everything that decides the next step."""
        decisions = [
            [*d.site, d.method, d.exponent, d.backoff, d.shift, d.measurement.to_state()]
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
        """Continue from what `to_json` returned; a ValueError if it is of another version of this package."""
        state = json.loads(text)
        try:
            decisions = [
                Decision(Site(*place), method, exponent, backoff, shift, Measurement.from_state(measurement))
                for *place, method, exponent, backoff, shift, measurement in state["decisions"]
            ]
            peaks = {Site(*place): peak for *place, peak in state["peaks"]}
            entry, iteration = self.entry.restored(state["entry"]), state["iteration"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "The scales in this snapshot are of another version of ada_loss: start afresh, or load it "
                "with that version."
            ) from error
        self.iteration, self.entry, self._peaks = iteration, entry, peaks
        self.decisions = {decision.site: decision for decision in decisions}
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
        decision = Decision(site, config.loss_scale_method, exponent, backoff, shift, measurement)
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
