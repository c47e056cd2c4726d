"""What a user can set: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ada_loss.core.rules import AUTO, RULES, Rule

METHODS = tuple(RULES)
"""Names of the rules by which a layer's scale is chosen; see `ada_loss.core.rules`."""

TIMINGS = ("current", "delayed")
"""Whether a layer chooses by what arrives in this step, or by what arrived in the step before."""

CAST_DISTRIBUTIONS = ("normal", "log_normal")
"""What the gradients at a cast to float16 may be taken to follow."""


@dataclass(frozen=True, kw_only=True)
class AdaLossConfig:
    """Settings of adaptive loss scaling.

    The two bounds and `n_uf` belong to the rules of the paper: `fixed` and `auto` do not look at them.

    Args:
        loss_scale_method: the rule, one of `METHODS`.
        init_scale: the scale with which gradients enter, a positive power of two.
        scale_upper_bound: the most that one layer may scale by, at least 1; None for no bound.
        accum_upper_bound: the most that the scales along the way may multiply to, at least 1; None for no
            bound.
        n_uf: the share of a layer's input gradient that may underflow, between 0 and 0.5.
        update_per_n_iteration: a layer chooses its scale anew every so many iterations, at least 1.
        dynamic_interval: the entry scale doubles after so many good steps in a row and halves on overflow, at
            least 1; None leaves it where it is until an overflow.
        timing: one of `TIMINGS`; with "delayed" backward does not wait for a GPU, but in the first step.
        cast_distribution: what gradients at a cast to a narrow format are taken to follow, one of
            `CAST_DISTRIBUTIONS`.

    Raises:
        TypeError: there is no setting of a name; the message says which one may be meant.
        ValueError: a setting is not what is described here; the message is one sentence.
    """

    loss_scale_method: str = AUTO.name
    init_scale: float = 1.0
    scale_upper_bound: float | None = 16.0
    accum_upper_bound: float | None = 1024.0
    n_uf: float = 1e-3
    update_per_n_iteration: int = 1
    dynamic_interval: int | None = None
    timing: str = "current"
    cast_distribution: str = "log_normal"

    def __new__(cls, **settings: Any) -> AdaLossConfig:
        for name in settings:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"AdaLossConfig takes no {name}=: {meant(name, cls.__dataclass_fields__)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_one_of("loss_scale_method", self.loss_scale_method, METHODS)
        _check_one_of("timing", self.timing, TIMINGS)
        _check_one_of("cast_distribution", self.cast_distribution, CAST_DISTRIBUTIONS)
        if not _is_real(self.init_scale) or self.init_scale <= 0 or math.frexp(self.init_scale)[0] != 0.5:
            raise ValueError(
                f"init_scale must be a positive power of two such as 1 or 1024, not {self.init_scale!r}."
            )
        for name in ("scale_upper_bound", "accum_upper_bound"):
            bound = getattr(self, name)
            if bound is not None and not (_is_real(bound) and bound >= 1):
                raise ValueError(
                    f"{name} must be a number of at least 1, or None for no bound, not {bound!r}."
                )
        if not _is_real(self.n_uf) or not 0 < self.n_uf < 0.5:
            raise ValueError(f"n_uf must be a share between 0 and 0.5, both excluded, not {self.n_uf!r}.")
        if not _is_count(self.update_per_n_iteration):
            raise ValueError(
                "update_per_n_iteration must be an integer of at least 1, "
                f"not {self.update_per_n_iteration!r}."
            )
        if self.dynamic_interval is not None and not _is_count(self.dynamic_interval):
            raise ValueError(
                "dynamic_interval must be an integer of at least 1, or None for a scale that does not grow, "
                f"not {self.dynamic_interval!r}."
            )

    @property
    def rule(self) -> Rule:
        """The rule by which scales are chosen."""
        return RULES[self.loss_scale_method]

    @property
    def delayed(self) -> bool:
        """Whether a layer chooses by what arrived in the step before."""
        return self.timing == "delayed"

    @property
    def init_exponent(self) -> int:
        """The exponent of `init_scale`, its log2."""
        return math.frexp(self.init_scale)[1] - 1


# Tools would take that of `__new__`.
_signature = inspect.signature(AdaLossConfig.__init__)
AdaLossConfig.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=list(_signature.parameters.values())[1:]
)


def meant(name: str, possible: Iterable[str]) -> str:
    """What to write in place of a keyword that there is not, as the end of a sentence."""
    possible = list(possible)
    close = difflib.get_close_matches(name, possible, 1)
    return f"did you mean {close[0]}=?" if close else f"it takes {', '.join(possible)}."


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
