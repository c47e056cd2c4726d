"""`prepare`: the second line that a user writes. An optimizer that hands true float32 gradients to hooks and updates."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np

from ada_loss.chainer.parameters import ScaledParameter, adopt, true_gradients_on_masters
from ada_loss.chainer.scaled import AdaLossScaled
from ada_loss.entry_scale import EntryScale
from ada_loss.statistics import all_finite


class Diverged(RuntimeError):
    """Steps keep overflowing although the entry scale cannot be lowered any more."""


class PreparedOptimizer:
    """What `prepare` adds to an optimizer.

    A step whose gradients are not all finite is skipped: no hook runs, no parameter, state or counter changes, and
    the entry scales of the model's scopes back off. Otherwise the whole update, hooks included, runs on the float32
    masters with the true gradients, and the float16 parameters receive the rounded result.
    """

    target: Any

    @property
    def overflow(self) -> EntryScale:
        """The entry scale: `.exponent` is its log2 now, `.skipped` the number of steps skipped so far."""
        return _scopes(self.target)[0].policy.entry

    def setup(self, link: chainer.Link) -> Any:
        super().setup(link)  # type: ignore[misc]
        _adopt_parameters(link)
        return self

    def update(self, lossfun: Any = None, *args: Any, **kwargs: Any) -> None:
        if lossfun is not None:
            loss = lossfun(*args, **kwargs)
            self.target.cleargrads()
            loss.backward(loss_scale=self._loss_scale)  # type: ignore[attr-defined]
            del loss
        parameters = [parameter for parameter in self.target.params() if isinstance(parameter, ScaledParameter)]
        finite = all_finite([array for parameter in parameters for array in parameter.arrays()])
        if finite:
            with true_gradients_on_masters(parameters):
                super().update()  # type: ignore[misc]
        else:
            self._skip()
        for scope in _scopes(self.target):
            scope.policy.end_step(finite=finite)
        if self.overflow.diverged:
            raise Diverged(
                f"Training diverged: the last {self.overflow.overflows} steps overflowed even at the smallest scale, "
                f"2**{self.overflow.exponent}. Lower the learning rate, or look for what makes the loss infinite."
            )

    def serialize(self, serializer: Any) -> None:
        super().serialize(serializer)  # type: ignore[misc]
        for path, parameter in self.target.namedparams():
            if parameter.is_initialized and parameter.dtype == np.float16:
                _serialize_master(serializer["ada_loss"][path], parameter)

    def _skip(self) -> None:
        """Tell Chainer's own dynamic loss scaling, if it is on, of the overflow."""
        self._loss_scaling_isnan = self._loss_scaling_isnan_ever = True
        self.update_loss_scale()  # type: ignore[attr-defined]


def prepare(optimizer: Any) -> Any:
    """Make an optimizer take the gradients of `AdaLossScaled` models; returns the optimizer.

    Call it after `optimizer.setup(model)`, on a plain optimizer or on ChainerMN's multi-node optimizer. A ValueError
    if the optimizer has no target yet, or its target holds no `AdaLossScaled`.
    """
    if optimizer.target is None:
        raise ValueError("Call optimizer.setup(model) before ada_loss.chainer.prepare(optimizer).")
    if not _scopes(optimizer.target):
        raise ValueError("The optimizer's model holds no AdaLossScaled: wrap the model before optimizer.setup(model).")
    _adopt_parameters(optimizer.target)
    if "actual_optimizer" in vars(optimizer):
        # MPI is needed only here.
        from ada_loss.chainer.mn import prepare_multi_node

        return prepare_multi_node(optimizer)
    prepare_in_place(optimizer, PreparedOptimizer)
    return optimizer


def prepare_in_place(optimizer: Any, mixin: type) -> None:
    """Put a mixin in front of an optimizer's class; once is enough."""
    cls = type(optimizer)
    if not issubclass(cls, mixin):
        object.__setattr__(optimizer, "__class__", type(f"Prepared{cls.__name__}", (mixin, cls), {}))


def _scopes(target: chainer.Link) -> list[AdaLossScaled]:
    return [link for link in target.links() if isinstance(link, AdaLossScaled)]


def _adopt_parameters(target: chainer.Link) -> None:
    for parameter in target.params():
        adopt(parameter)


def _serialize_master(serializer: Any, parameter: ScaledParameter) -> None:
    if isinstance(serializer, chainer.serializer.Serializer):
        if parameter.master is not None:
            serializer("master", parameter.master)
        return
    try:
        master = serializer("master", None)
    except KeyError:
        # A snapshot from before the optimizer was prepared: the masters start from the parameters.
        master = None
    parameter.master = None if master is None else parameter.device.send(np.asarray(master, np.float32))
