"""A rule that scales float32 by whatever comes, so that nothing but a wrong rule can change a gradient."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch.shifts import Shifts


@dataclass(frozen=True, eq=False)
class ForcedShifts(Shifts):
    """Random factors between 2**-6 and 2**6 wherever there is a choice."""

    random: random.Random = field(default_factory=random.Random)

    def entering(self, gradient):
        return self._factor().double()

    def of_product(self, product, scale, gradient, factor, fan):
        return self._factor()

    def of_sum(self, total, scale, meeting=()):
        return self._factor()

    def _factor(self):
        return torch.tensor(2.0 ** self.random.randint(-6, 6))


def forced_shifts(seed):
    return ForcedShifts(AdaLossConfig(), None, frozenset([torch.float32]), random=random.Random(seed))
