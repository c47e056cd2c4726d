"""`check`: looks at a model before it is trained, and says what float16 would do to its gradients.

A step or a few are computed in float32, which tells the truth about every gradient, and once more in float16
with scales of their own. Both on copies: the model stays what it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ada_loss.core.record_file import Run
from ada_loss.core.records import Place
from ada_loss.core.verdicts import Word, percent, power
from ada_loss.report.facts import FIXED, RunFacts, line_sentence, lines
from ada_loss.report.table import table, wrapped

Loss = Callable[..., Any]
"""loss(model, *batch) is a scalar of the framework."""

MOST_LAYERS = 40
"""So many layers are printed; of more, those that suit the fewest scales."""


@dataclass(frozen=True)
class Check:
    """What a check has found.

    truth: gradients and results in float32. adaptive: the same in float16, with scales of their own.
    seconds: how long it took.
    """

    truth: RunFacts
    adaptive: RunFacts
    seconds: float

    @property
    def sentence(self) -> str:
        """What can be said of the model."""
        return self.truth.sentence

    @property
    def kept(self) -> float:
        """The smallest share that any gradient has kept of its non-zero elements with scales of its own."""
        true = {place.place: place.truth.nonzero for place in self.truth.gradients}
        own = {place.place: place.own.nonzero for place in self.adaptive.gradients}
        shares = [own[place] / true[place] for place in own if true.get(place)]
        return min([1.0, *shares])

    def verdict(self, place: Place) -> str:
        """That of a place in plain float16."""
        return str(next(found for found in self.truth.places if found.place == place).at(0))

    @property
    def recommendation(self) -> str:
        """Whether plain float16 does, or a fixed scale, and which, or only scales of their own."""
        window, words = self.truth.window, self.truth.verdicts
        if words[Word.OVERFLOW_FORWARD]:
            return (
                "Compute the part that overflows in float32, or normalize what goes into it: no scale helps."
            )
        if not self.truth.gradients:
            return "Nothing to recommend: no gradient was seen."
        if 0 in window:
            return "Plain float16 does. A scale does no harm, and helps when gradients become smaller."
        if not window.empty:
            low, high = int(window.lowest), int(window.highest)
            fixed = FIXED if FIXED in window else (low + high) // 2
            return f"A fixed scale does: {2.0**fixed:g} ({power(fixed)}). auto finds scales by itself."
        return "No single scale does: use auto, by which every layer finds its own."

    def __str__(self) -> str:
        said = [
            self.sentence,
            *(line_sentence(self.truth, line) for line in lines(self.truth, [self.truth])),
            f"With auto every gradient keeps {percent(self.kept)} of its non-zero elements.",
            self.recommendation,
            f"Checked in {self.seconds:.0f} s.",
        ]
        return "\n".join([table(self.truth, most=MOST_LAYERS, summary=False), "", *map(wrapped, said)])


def check(model: Any, batch: Any = None, loss: Loss | None = None, *, steps: int = 1) -> Check:
    """Find out what float16 would do to a model's gradients, without training it and without changing it.

    Args:
        model: a Chainer link or a PyTorch module.
        batch: what the model is called with: an array or tensor, or a tuple of them; random images or vectors
            as its first layer takes them, if left out.
        loss: loss(model, *batch), a scalar. If left out, what the model returns, if that is a scalar, or the
            cross entropy of its results with random classes.
        steps: how many times to compute it; more average over what is random in the model.

    Returns:
        What was found; `print` it.

    Raises:
        TypeError: the model is neither of Chainer nor of PyTorch.
        ValueError: no batch can be made for the model, or `steps` is not positive.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, not {steps!r}.")
    began = time.perf_counter()
    truth, adaptive = _front_end(model)(model, batch, loss, steps)
    return Check(RunFacts("float32", truth), RunFacts("auto", adaptive), time.perf_counter() - began)


def _front_end(model: Any) -> Callable[[Any, Any, Loss | None, int], tuple[Run, Run]]:
    """The trial of the framework that a model is of."""
    roots = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    # Neither is imported for the other's models.
    if "torch" in roots:
        from ada_loss.torch.checking import trial

        return trial
    if "chainer" in roots:
        from ada_loss.chainer.checking import trial as chainers

        return chainers
    raise TypeError(f"check looks at Chainer links and PyTorch modules, not at {type(model).__name__}.")
