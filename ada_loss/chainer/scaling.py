"""`model.ada_loss`: everything that this package keeps on a scaled model."""

from __future__ import annotations

import weakref
from typing import Any

import chainer
import numpy as np

from ada_loss.chainer import ownership
from ada_loss.chainer.fan_outs import FanOut
from ada_loss.chainer.policy import ChainerPolicy
from ada_loss.chainer.scope import Scope
from ada_loss.chainer.tagging import LinkPaths
from ada_loss.chainer.transforms import Report
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.decision import Decision
from ada_loss.core.decision_table import decision_table


class Scaling:
    """The settings, shifts and report of a model that `AdaLossScaled` has scaled.

    policy: the shifts and the entry scale. report: which layers were converted, which were left, and why.
    output_dtype: what float16 results of the model's call are cast to; None leaves them. told: what has been
    said of the model, and is said once.
    """

    def __init__(self, policy: ChainerPolicy, output_dtype: np.dtype[Any] | None) -> None:
        self.policy = policy
        self.report = Report({}, {})
        self.output_dtype = output_dtype
        self.told: set[str] = set()
        self._paths = LinkPaths()

    @property
    def config(self) -> AdaLossConfig:
        """The settings."""
        return self.policy.config

    @property
    def decisions(self) -> list[Decision]:
        """The latest decision of every decision point, in the order in which backward first met them."""
        return list(self.policy.decisions.values())

    @property
    def fan_outs(self) -> tuple[FanOut, ...]:
        """Where the graph of the first forward pass fans out, so that gradients meet; () before it."""
        return self.policy.fan_outs or ()

    def scope(self, model: chainer.Link) -> Scope:
        """A scope for one call of the model, or for what a backward pass meets of it."""
        if not ownership.is_scaled(model):
            # A copy that the model's own class has made.
            ownership.register(model)
        return Scope(self.policy, self._paths, weakref.ref(model), self.output_dtype)

    def copied(self, *, fresh: bool) -> Scaling:
        """The same settings for a copy of the model; with the same scales, or fresh ones."""
        policy = ChainerPolicy(self.config, self.policy.parts)
        if not fresh:
            policy.load_json(self.policy.to_json())
        copied = Scaling(policy, self.output_dtype)
        copied.report = self.report
        return copied

    def __repr__(self) -> str:
        """The settings, the entry scale, and a table of the latest decisions, a row a layer."""
        layers = (
            f"{len(self.report.converted)} layers scaled, {len(self.report.left)} links with parameters left"
        )
        head = f"{self.config.loss_scale_method}: {layers}; {self.policy.entry!r}"
        if not self.decisions:
            return f"{head}\nNo backward pass has met a decision point yet."
        return f"{head}\n{decision_table(self.decisions)}"
