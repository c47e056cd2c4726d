"""The policy of a model in Chainer: `core.policy` on its arrays, in the steps of its backward engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ada_loss.arrays.library import deferred_amax, summarize
from ada_loss.arrays.measuring import WeightStatistics, measure
from ada_loss.chainer import backward_state
from ada_loss.chainer.fan_outs import FanOut
from ada_loss.chainer.gradient import Accumulation, ScaledGradient, amaxes_of
from ada_loss.chainer.parts import Parts
from ada_loss.chainer.tagging import Point
from ada_loss.core.alignment import HEADROOM
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Decision, Site
from ada_loss.core.formats import FLOAT16, FloatFormat
from ada_loss.core.measurement import Factor
from ada_loss.core.policy import ACCUMULATION, ShiftPolicy
from ada_loss.core.rules import FIXED


class ChainerPolicy(ShiftPolicy):
    """Chooses the shifts of a model's decision points, and remembers where its graph fans out."""

    def __init__(
        self,
        config: AdaLossConfig,
        parts: Parts | None = None,
        number_format: FloatFormat = FLOAT16,
    ) -> None:
        self.parts = parts or Parts()
        super().__init__(config, self.parts, number_format)
        self.fan_outs: tuple[FanOut, ...] | None = None
        self.has_met_float16 = False
        self._weights = WeightStatistics()

    def next_call(self, path: str) -> int:
        """How often `path` has been asked for in this step."""
        if self._met and not self.stepped and not backward_state.running():
            # Nobody says whether the passes before and the next one make one step.
            self.begin_step()
        return super().next_call(path)

    def choose_for(
        self,
        site: Site,
        gy: Any,
        exponent: int,
        factor: Factor | None = None,
        own: AdaLossConfig | None = None,
    ) -> Decision:
        """The shift at a site, and why, for the output gradient `gy` (an array) that carries `exponent`.

        Args:
            site: where.
            gy: the output gradient.
            exponent: what it carries.
            factor: what gy is multiplied by; None at a cast.
            own: settings of the site itself, if it has any.
        """
        self.note_pass(backward_state.number())
        repeated = factor is not None and factor.is_parameter and self._calls[site.path] > 1
        summarize_weight = self._weights.summarize if repeated else summarize
        return self.choose(site, exponent, lambda config: measure(config, gy, factor, summarize_weight), own)

    def fixed_exponent(self, point: Point) -> int | None:
        """What gradients carry at a decision point with a fixed scale, where parts of the model have fixed
        scales of their own; None at any other."""
        if not self.parts.have_scales or self.settings(point.site, point.config).rule != FIXED:
            return None
        part = self.parts.part(point.site.path)
        if part is None and point.config is None:
            return self.entry.exponent
        return part.config.init_exponent - self.entry.backoff if part and part.has_scale else None

    def accumulation(self) -> Accumulation:
        """What is known of gradients that meet in a backward pass, as all do in the same order in every
        step."""
        self.note_pass(backward_state.number())
        place = super().next_call(ACCUMULATION)
        headroom = HEADROOM + self.entry.backoff
        if not self.config.delayed and self.config.update_per_n_iteration == 1:
            return Accumulation(amaxes_of, headroom)
        return Accumulation(lambda gradients: self._known_amaxes(gradients, place), headroom)

    def begin_step(self) -> None:
        super().begin_step()
        self._weights.clear()

    def load_json(self, text: str) -> None:
        super().load_json(text)
        self._weights.clear()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_weights": WeightStatistics()}

    def _known_amaxes(self, gradients: Sequence[ScaledGradient], place: int) -> list[float]:
        return self.amaxes(
            [gradient.exponent for gradient in gradients],
            lambda: [deferred_amax(gradient.array) for gradient in gradients],
            place,
        )
