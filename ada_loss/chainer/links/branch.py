"""An explicit fan-out as a link, so that it shows where a model is printed."""

from __future__ import annotations

from typing import Any

import chainer

from ada_loss.chainer.functions.branch import branch


class AdaLossBranch(chainer.Link):
    """Gives its input to `n` consumers, as in `a, b = AdaLossBranch(2)(x)`, and adds up their gradients."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.n = n

    @property
    def printable_specs(self) -> Any:
        yield "n", self.n

    def forward(self, x: Any) -> tuple[chainer.Variable, ...]:
        return branch(x, self.n)
