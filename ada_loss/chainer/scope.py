"""The scope: what one call of a scaled model adds to Chainer's graph, where gradients carry exponents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any

import chainer
import numpy as np
from chainer.utils.type_check import InvalidType

from ada_loss.chainer.fan_outs import find_fan_outs
from ada_loss.chainer.mixed_formats import explain
from ada_loss.chainer.nested import map_variables
from ada_loss.chainer.policy import ChainerPolicy
from ada_loss.chainer.products import Product, factor_of
from ada_loss.chainer.soft_float32 import hardened, soft
from ada_loss.chainer.tagging import LinkPaths, Point, Recorder
from ada_loss.core.decision import Decision

ENTRY = "(entry)"
"""The name under which the cast of a scope's own results is recorded."""


@dataclass(frozen=True)
class Scope:
    """What the functions of one call of a scaled model share.

    output_dtype: what float16 results are cast to; None leaves them. link: refers to the model weakly,
    since the model may keep variables, and with them the scope.
    """

    policy: ChainerPolicy
    paths: LinkPaths
    link: weakref.ref[chainer.Link]
    output_dtype: np.dtype[Any] | None

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's results, as `forward` computes them, in this scope."""
        first = chainer.config.enable_backprop and self.policy.fan_outs is None
        applied: list[tuple[Any, str]] | None = [] if first else None
        recorder = self.recorder(applied)
        args, kwargs = map_variables(hardened, (args, kwargs), objects=False)
        results = self._computed(recorder, partial(forward, *args, **kwargs))
        if applied is not None:
            self.policy.fan_outs = find_fan_outs(applied)
        if isinstance(results, GeneratorType):
            return self._steps(results)
        return self._steps(item for item in results) if _is_lazy(results) else results

    def recorder(self, applied: list[tuple[Any, str]] | None = None) -> Recorder:
        """A recorder that tags functions as belonging to this scope."""
        return Recorder(self, self._path_of, self.policy.next_call, applied)

    @property
    def entry_exponent(self) -> int:
        """The exponent that gradients get as they enter."""
        return self.policy.entry.exponent

    def choose_for_product(
        self, point: Point, function: Any, product: Product, gy: Any, exponent: int
    ) -> Decision:
        """The shift for the gradient of input `product.data`, computed from gy, which carries `exponent`."""
        site = point.site._replace(operand=product.data)
        return self.policy.choose_for(site, gy, exponent, factor_of(function, product, gy), point.config)

    def scales_sums(self, point: Point | None) -> bool:
        """Whether sums of many gradients get scales of their own, at a decision point or elsewhere."""
        policy = self.policy
        return (policy.settings(point.site, point.config) if point else policy.config).rule.scales_sums

    def choose_for_cast(self, point: Point, gy: Any, exponent: int) -> Decision:
        """The shift with which a gradient is rounded to float16."""
        return self.policy.choose_for(point.site, gy, exponent, own=point.config)

    def _computed(self, recorder: Recorder, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, on its way out of this scope."""
        try:
            with recorder:
                results = compute()
                with recorder.named(ENTRY, None):
                    return map_variables(self._leaving, results)
        except InvalidType as error:
            explain(error)
            raise

    def _steps(self, results: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Results that are computed one by one, as somebody asks for them: each in this scope."""
        resume: Callable[[], Any] = partial(next, results)
        while True:
            try:
                result = self._computed(self.recorder(), resume)
            except StopIteration as end:
                return end.value
            try:
                sent = yield result
                resume = partial(results.send, sent)
            except GeneratorExit:
                results.close()
                raise
            except BaseException as error:
                resume = partial(results.throw, error)

    def _leaving(self, result: Any) -> Any:
        if self.output_dtype is None or result.dtype != np.float16:
            return result
        if not isinstance(result, chainer.Variable):
            return result.astype(self.output_dtype)
        return result if result.array is None else soft(result, self.output_dtype)

    def _path_of(self, link: chainer.Link) -> str | None:
        root = self.link()
        return None if root is None else self.paths.find(link, root)


def _is_lazy(results: Any) -> bool:
    """Whether results are computed as somebody asks for them, as by `map`."""
    return isinstance(results, map | filter | zip)
