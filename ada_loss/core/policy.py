"""What a model decides and remembers, in any front end: every decision point's shift, the entry scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ada_loss.core import policy_state
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Decision, Site, StepMeasurements
from ada_loss.core.deferred import Deferred, Ready, combine, fetch
from ada_loss.core.entry_scale import EntryScale
from ada_loss.core.formats import FLOAT16, FloatFormat
from ada_loss.core.measurement import Measurement
from ada_loss.core.range import Range

STEADY = 100
"""After how many steps of one backward pass each the next is taken to be one of those as well."""

ACCUMULATION = "(accumulation)"
"""The name of places at which gradients are accumulated, in place of a layer's path."""


class ShiftPolicy:
    """Chooses shifts by the configured rule, from what is measured every `update_per_n_iteration` iterations.

    In between, and with delayed timing, what was measured last stands for what arrives. Where a step adds up
    the gradients of several backward passes, of tasks or of micro-batches that may differ in any way and come
    in any order, each pass is measured as it arrives.

    Args:
        config: the settings.
        layers: settings of layers that a filter refused, by path.
        number_format: the format that gradients are kept in.
    """

    shared = False
    """Whether other processes have such a policy too, so that measurements count only when all have them."""

    stepped = False
    """Whether an optimizer says where a step ends."""

    def __init__(
        self,
        config: AdaLossConfig,
        layers: dict[str, AdaLossConfig] | None = None,
        number_format: FloatFormat = FLOAT16,
    ) -> None:
        self.config = config
        self.layers = layers or {}
        self.number_format = number_format
        self.entry = EntryScale.from_config(config, number_format)
        self.iteration = 0
        self.single_passes = STEADY
        self.decisions: dict[Site, Decision] = {}
        self._amaxes: dict[Site, float] = {}
        self._deferred: dict[Site, Deferred[Range]] = {}
        self._deferred_amaxes: dict[Site, Deferred[float]] = {}
        self._calls: Counter[str] = Counter()
        self._met: set[Site] = set()
        self._passes: set[int] = set()

    def note_pass(self, number: int) -> None:
        """Note that the backward pass of this number comes by."""
        self._passes.add(number)

    @property
    def adds_passes(self) -> bool:
        """Whether this step adds up several backward passes, as far as can be told from the last ones."""
        return len(self._passes) > 1 or self.single_passes < STEADY

    def next_call(self, path: str) -> int:
        """How often `path` has been asked for in this step."""
        self._calls[path] += 1
        return self._calls[path] - 1

    def counted(self) -> Counter[str]:
        """How often each path has been asked for in this step, for `count_from`."""
        return self._calls.copy()

    def count_from(self, counted: Counter[str]) -> None:
        """Go on counting from there, where a part of a pass is computed again."""
        self._calls = counted.copy()

    def settings(self, site: Site, own: AdaLossConfig | None = None) -> AdaLossConfig:
        """The settings at a site; own: those of the site itself, if it has any."""
        return own or self.layers.get(site.path, self.config)

    def choose(
        self,
        site: Site,
        exponent: int,
        measure: Callable[[AdaLossConfig], Deferred[Measurement]],
        own: AdaLossConfig | None = None,
    ) -> Decision:
        """The shift at a site, and why.

        Args:
            site: where.
            exponent: what the gradient that arrives carries.
            measure: begins to measure what the rule of these settings needs to know; called if it is due.
            own: settings of the site itself, if it has any.
        """
        self._met.add(site)
        config = self.settings(site, own)
        rule, known = config.rule, self.decisions.get(site)
        before = known.range if known is not None and known.rule == rule else None
        found = before
        # Where there was nothing to scale, nothing is known yet.
        if found is None or found.nothing or self._is_due(config):
            find = partial(rule.range, config, self.number_format, exponent=exponent)
            deferred: Deferred[Range] = combine(find, measure(config))
            if found is None or not config.delayed or self.adds_passes:
                (found,) = fetch([deferred])
                deferred = Ready(found)
            if config.delayed:
                # Several passes over one graph come by here several times.
                earlier = self._deferred.get(site)
                self._deferred[site] = (
                    deferred if earlier is None else combine(Range.merged, earlier, deferred)
                )
        shift = rule.shift(config, found, exponent, backoff=self.entry.backoff)
        decision = Decision(site, rule, exponent, shift, found.remembering(before))
        if not found.unusable:
            self.decisions[site] = decision
        return decision

    def amaxes(
        self, exponents: Sequence[int], look: Callable[[], Sequence[Deferred[float]]], place: int
    ) -> list[float]:
        """What is taken for the amaxes of gradients that are accumulated, as they arrive.

        They follow from what was accumulated there before, with delayed timing and between measurements.

        Args:
            exponents: what the gradients carry.
            look: begins to look for their amaxes; called if it is due.
            place: which of the places in a step, which come in the same order in every step.
        """
        sites = [Site(ACCUMULATION, place, operand) for operand in range(len(exponents))]
        self._met.update(sites)
        found = [self._amaxes.get(site, math.nan) for site in sites]
        unknown = any(map(math.isnan, found))
        # Of a gradient that was zero nothing is known either.
        if unknown or 0 in found or self._is_due(self.config):
            true: Sequence[Deferred[float]] = [
                combine(partial(_true_amax, exponent), amax)
                for exponent, amax in zip(exponents, look(), strict=True)
            ]
            if unknown or not self.config.delayed or self.adds_passes:
                found = fetch(true)
                true = [Ready(amax) for amax in found]
                self._remember(_finite(zip(sites, found, strict=True)))
            if self.config.delayed:
                self._deferred_amaxes.update(zip(sites, true, strict=True))
        return [math.ldexp(amax, exponent) for amax, exponent in zip(found, exponents, strict=True)]

    @property
    def has_measurements(self) -> bool:
        """Whether something has been measured that no decision follows from yet."""
        return bool(self._deferred or self._deferred_amaxes)

    def use_measurements(self, agree: Callable[[StepMeasurements], StepMeasurements] | None = None) -> None:
        """Let the next decisions follow from what has been measured, with one transfer from a device.

        Args:
            agree: makes of what this process has measured what all have.
        """
        fetched: list[Any] = fetch([*self._deferred.values(), *self._deferred_amaxes.values()])
        measured = StepMeasurements(
            dict(zip(self._deferred, fetched, strict=False)),
            _finite(zip(self._deferred_amaxes, fetched[len(self._deferred) :], strict=True)),
        )
        self._deferred, self._deferred_amaxes = {}, {}
        ranges, amaxes = agree(measured) if agree else measured
        for site, new in ranges.items():
            known = self.decisions.get(site)
            if known is not None and not new.unusable:
                found = new.remembering(known.range)
                self.decisions[site] = Decision(site, known.rule, known.exponent, known.shift, found)
        self._remember({site: amax for site, amax in amaxes.items() if site in self._amaxes})

    def end_step(self, *, finite: bool, scale_helps: bool = True) -> None:
        """Close a step: the optimizer has updated, or skipped because a gradient was not finite.

        scale_helps: see `EntryScale.after`.
        """
        self.entry = self.entry.after(finite=finite, scale_helps=scale_helps)
        self.iteration += 1
        self._count_passes()
        # Sites that do not come up any more would pile up.
        self.decisions = {site: decision for site, decision in self.decisions.items() if site in self._met}
        self._amaxes = {site: amax for site, amax in self._amaxes.items() if site in self._met}
        self.begin_step()

    def clear(self) -> None:
        """Begin a step if a backward pass has been: without a prepared optimizer nobody says that one ended.

        Gradients may also be cleared between forward and backward, where recomputation will go on counting.
        """
        if self._met:
            self.begin_step()
            if not self.stepped:
                self._count_passes()

    def begin_step(self) -> None:
        """Count the applications of each layer from zero again."""
        if not self.shared:
            self.use_measurements()
        self._calls.clear()
        self._met.clear()

    def to_json(self) -> str:
        """Everything that decides the next step."""
        return policy_state.to_json(
            self.iteration, self.single_passes, self.entry, self.decisions.values(), self._amaxes
        )

    def load_json(self, text: str) -> None:
        """Continue from what `to_json` returned.

        Raises:
            ValueError: it is of a version of this package that is not known here.
        """
        self.iteration, self.single_passes, self.entry, self.decisions, self._amaxes = policy_state.from_json(
            text, self.entry
        )
        self._deferred.clear()
        self._deferred_amaxes.clear()
        self._calls.clear()
        self._passes.clear()

    def reset(self) -> None:
        """Start afresh, as after construction."""
        self.__init__(self.config, self.layers, self.number_format)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        # What is deferred is of these very arrays, and not of their copies.
        return vars(self) | {"_deferred": {}, "_deferred_amaxes": {}}

    def _count_passes(self) -> None:
        self.single_passes = 0 if len(self._passes) > 1 else min(STEADY, self.single_passes + 1)
        self._passes.clear()

    def _is_due(self, config: AdaLossConfig) -> bool:
        """Whether something is to be measured in this iteration even if it has been before."""
        return self.adds_passes or self.iteration % config.update_per_n_iteration == 0

    def _remember(self, amaxes: dict[Site, float]) -> None:
        # A gradient that is zero once says nothing about the next.
        self._amaxes.update((site, amax) for site, amax in amaxes.items() if amax or site not in self._amaxes)


def _true_amax(exponent: int, amax: float) -> float:
    return math.ldexp(amax, -exponent)


def _finite(amaxes: Iterable[tuple[Site, float]]) -> dict[Site, float]:
    return {site: amax for site, amax in amaxes if math.isfinite(amax)}
