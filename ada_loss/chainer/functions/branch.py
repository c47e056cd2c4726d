"""An explicit fan-out."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np


class Branch(chainer.FunctionNode):
    """Gives its input to several consumers; their gradients are aligned and added on the way back."""

    def __init__(self, n: int) -> None:
        self.n = n

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs * self.n

    def backward(self, targets: tuple[int, ...], gys: tuple[Any, ...]) -> tuple[Any, ...]:
        present = [gy for gy in gys if gy is not None]
        return (chainer.functions.add(*present) if len(present) > 1 else present[0] if present else None,)


def branch(x: Any, n: int) -> tuple[chainer.Variable, ...]:
    """`n` variables with the value of `x`, one for each consumer.

    Inside `AdaLossScaled` a variable that is used more than once is a fan-out by itself; this makes one
    visible, under its own name, in the graph. A ValueError if n is not an integer of at least 1.
    """
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"A branch needs a number of outputs of at least 1, not {n!r}.")
    return Branch(int(n)).apply((x,))
