"""What a scope decides and remembers: the shift of every decision point, and the entry scale."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ada_loss.arrays.statistics import Begun, Statistics, begin, begin_largest, combine, fetch
from ada_loss.chainer import backward_state
from ada_loss.chainer.fan_outs import FanOut
from ada_loss.chainer.gradient import HEADROOM, InFlight, Meeting, largest_magnitudes
from ada_loss.chainer.tagging import Site
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.entry_scale import EntryScale
from ada_loss.core.measurement import begin_measurement
from ada_loss.core.rules import Range, choose_shift, find_range

T = TypeVar("T")

MEETING = "(meeting)"
"""The name of places at which gradients meet, in place of a layer's path."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A shift as it was last chosen, for a gradient that carried `exponent`.

    method: the rule. range: what it made of the latest measurement, from which the next shift follows.
    """

    site: Site
    method: str
    exponent: int
    shift: int
    range: Range


class Learned(NamedTuple):
    """What a process has measured in a step, by site: ranges, and the sizes of true gradients that met."""

    ranges: dict[Site, Range]
    peaks: dict[Site, float]

    def merged(self, other: Learned) -> Learned:
        """What both have measured, each site's taken together."""
        return Learned(_union(self.ranges, other.ranges, Range.merged), _union(self.peaks, other.peaks, max))


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
        self.fan_outs: tuple[FanOut, ...] | None = None
        self._peaks: dict[Site, float] = {}
        self._begun: dict[Site, Begun[Range]] = {}
        self._begun_peaks: dict[Site, Begun[float]] = {}
        self._weights: dict[tuple[int, bool], tuple[Any, Begun[Statistics]]] = {}
        self._calls: Counter[str] = Counter()
        self._met: set[Site] = set()

    def next_call(self, path: str) -> int:
        """How often `path` has been asked for in this step."""
        if not backward_state.running():
            self.clear()
        self._calls[path] += 1
        return self._calls[path] - 1

    def counted(self) -> Counter[str]:
        """How often each path has been asked for in this step, for `count_from`."""
        return self._calls.copy()

    def count_from(self, counted: Counter[str]) -> None:
        """Go on counting from there, where a part of a pass is computed again."""
        self._calls = counted.copy()

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

        weight, fan, channel_axis: see `core.measurement`; no weight at a cast. config: the site's own
        settings. parameter: whether `weight` is the array of a parameter, which is the same for a whole step.
        """
        self._met.add(site)
        config = self.settings(site, config)
        known = self.decisions.get(site)
        before = known.range if known is not None and known.method == config.loss_scale_method else None
        found = before
        # Where there was nothing to scale, nothing is known yet.
        if found is None or found.safe == math.inf or self._is_due(config):
            summarize = self._begin_weight if parameter and self._calls[site.path] > 1 else begin
            begun = combine(
                partial(find_range, config, exponent),
                begin_measurement(config, gy, weight, fan, channel_axis, summarize),
            )
            if found is None or config.timing == "current":
                (found,) = fetch([begun])
                begun = found
            if config.timing == "delayed":
                # Several passes over one graph come by here several times.
                earlier = self._begun.get(site)
                self._begun[site] = begun if earlier is None else combine(Range.merged, earlier, begun)
        shift = choose_shift(config, found, exponent, backoff=self.entry.backoff)
        decision = Decision(site, config.loss_scale_method, exponent, shift, found.remembering(before))
        if found.finite:
            self.decisions[site] = decision
        return decision

    def meeting(self) -> Meeting:
        """What is known of gradients that meet in a backward pass, as all do in the same order in every step.

        With delayed timing, and between measurements, their sizes follow from those that met there before.
        """
        self._calls[MEETING] += 1
        always = self.config.timing == "current" and self.config.update_per_n_iteration == 1
        peaks = largest_magnitudes if always else partial(self._known_peaks, self._calls[MEETING])
        return Meeting(peaks, HEADROOM + self.entry.backoff)

    def _known_peaks(self, number: int, gradients: Sequence[InFlight]) -> list[float]:
        sites = [Site(MEETING, number, operand) for operand in range(len(gradients))]
        self._met.update(sites)
        found = [self._peaks.get(site, math.nan) for site in sites]
        unknown = any(map(math.isnan, found))
        # Of a gradient that was zero nothing is known either.
        if unknown or 0 in found or self._is_due(self.config):
            begun = [combine(partial(_true_peak, g.exponent), begin_largest(g.array)) for g in gradients]
            if unknown or self.config.timing == "current":
                found = fetch(begun)
                begun = [*found]
                self._remember(_finite(zip(sites, found, strict=True)))
            if self.config.timing == "delayed":
                self._begun_peaks.update(zip(sites, begun, strict=True))
        return [math.ldexp(peak, g.exponent) for peak, g in zip(found, gradients, strict=True)]

    def _remember(self, peaks: dict[Site, float]) -> None:
        # A gradient that is zero once says nothing about the next.
        self._peaks.update((site, peak) for site, peak in peaks.items() if peak or site not in self._peaks)

    def _is_due(self, config: AdaLossConfig) -> bool:
        """Whether something is to be measured in this iteration even if it has been before."""
        return self.iteration % config.update_per_n_iteration == 0

    def settings(self, site: Site, own: AdaLossConfig | None = None) -> AdaLossConfig:
        """The settings at a site; own: those of the site itself, if it has any."""
        return own or self.layers.get(site.path, self.config)

    @property
    def measures(self) -> bool:
        """Whether something has been begun to measure that nothing has been learned from yet."""
        return bool(self._begun or self._begun_peaks)

    def learn(self, agree: Callable[[Learned], Learned] | None = None) -> None:
        """Let the next decisions follow from what has been begun to measure, with one transfer from a GPU.

        agree: makes of what this process has measured what all have.
        """
        fetched: list[Any] = fetch([*self._begun.values(), *self._begun_peaks.values()])
        learned = Learned(
            dict(zip(self._begun, fetched, strict=False)),
            _finite(zip(self._begun_peaks, fetched[len(self._begun) :], strict=True)),
        )
        self._begun, self._begun_peaks = {}, {}
        ranges, peaks = agree(learned) if agree else learned
        for site, new in ranges.items():
            known = self.decisions.get(site)
            if known is not None and new.finite:
                found = new.remembering(known.range)
                self.decisions[site] = Decision(site, known.method, known.exponent, known.shift, found)
        self._remember({site: peak for site, peak in peaks.items() if site in self._peaks})

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
            [*d.site, d.method, d.exponent, d.shift, astuple(d.range)] for d in self.decisions.values()
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
                Decision(Site(*place), method, exponent, shift, Range(*found))
                for *place, method, exponent, shift, found in state["decisions"]
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
        self._begun_peaks.clear()
        self._weights.clear()
        self._calls.clear()

    def reset(self) -> None:
        """Start afresh, as after construction."""
        self.__init__(self.config, self.layers)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # What has been begun is begun on these very arrays, and not on their copies.
        return vars(self) | {"_begun": {}, "_begun_peaks": {}, "_weights": {}}

    def _begin_weight(self, weight: Any, *, smallest: bool) -> Begun[Statistics]:
        """Statistics of a weight that is used several times in a step, computed once."""
        # The array is kept, so that no other one gets its id.
        key = id(weight), smallest
        if key not in self._weights:
            self._weights[key] = weight, begin(weight, smallest=smallest)
        return self._weights[key][1]


def _true_peak(exponent: int, peak: float) -> float:
    return math.ldexp(peak, -exponent)


def _finite(peaks: Iterable[tuple[Site, float]]) -> dict[Site, float]:
    return {site: peak for site, peak in peaks if math.isfinite(peak)}


def _union(mine: dict[Site, T], other: dict[Site, T], both: Callable[[T, T], T]) -> dict[Site, T]:
    """The values of both; at sites that both have, what is made of the two."""
    return mine | other | {site: both(mine[site], other[site]) for site in mine.keys() & other.keys()}
