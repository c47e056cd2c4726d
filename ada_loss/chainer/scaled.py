"""`AdaLossScaled`: wraps a model so that its gradients find their own scales."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import chainer
import numpy as np
from chainer import serializer as chainer_serializer

from ada_loss.chainer import backward_state
from ada_loss.chainer.fan_outs import FanOut
from ada_loss.chainer.parameters import ScaledParameter
from ada_loss.chainer.policy import Decision, ShiftPolicy
from ada_loss.chainer.scope import Scope
from ada_loss.chainer.snapshot import load_optional
from ada_loss.chainer.tagging import LinkPaths, active_recorder
from ada_loss.chainer.transforms import Filter, Report, transform
from ada_loss.core.config import AdaLossConfig


class AdaLossScaled(chainer.Chain):
    """A link whose gradients carry scales of their own, chosen layer by layer while training runs.

    Args:
        link: any link. It becomes `.link`; its layers become scaled variants, in place.
        loss_scale_method: the rule, see `AdaLossConfig`, which also describes the other `settings`.
        filter: a function (path, link) -> bool that says which layers to scale; all of them by default.
        output_dtype: float16 results are cast to it, None leaves them float16. The loss is then computed in
            float32, and the gradients that enter are scaled before they are rounded.
        settings: any field of `AdaLossConfig`; a bad one raises a ValueError.

    Call it as the link itself: it takes and returns what the link takes and returns. Inside another
    `AdaLossScaled` it is just the link. Attributes and methods of the link are reachable on it, but only what
    is computed by calling it is scaled. Saved, it has the paths of the plain link, and its own state beside
    them under `ada_loss/`.

    In float32 gradients equal those of the plain link bit for bit. That takes functions whose backward is
    linear in the gradient, as every one of Chainer's is; a function of your own that clips or normalizes the
    gradient sees it scaled, and belongs outside.

    The parameters' gradients stay scaled until an optimizer that `ada_loss.chainer.prepare` has prepared asks
    for them.
    """

    def __init__(
        self,
        link: chainer.Link,
        loss_scale_method: str = "auto",
        *,
        filter: Filter | None = None,
        output_dtype: Any = "float32",
        **settings: Any,
    ) -> None:
        config = AdaLossConfig(loss_scale_method=loss_scale_method, **settings)
        if not isinstance(link, chainer.Link):
            raise TypeError(f"AdaLossScaled wraps a chainer.Link, not {type(link).__name__}.")
        super().__init__()
        self.report, refused = transform(link, filter)
        self.policy = ShiftPolicy(config, refused)
        self._paths = LinkPaths()
        self._output_dtype = None if output_dtype is None else np.dtype(output_dtype)
        with self.init_scope():
            self.link = link

    report: Report
    """What the transform converted and what it left, and why."""

    policy: ShiftPolicy
    """The shifts and the entry scale."""

    @property
    def config(self) -> AdaLossConfig:
        return self.policy.config

    @property
    def decisions(self) -> list[Decision]:
        """The latest decision of every decision point, in the order in which backward first met them."""
        return list(self.policy.decisions.values())

    @property
    def branches(self) -> tuple[FanOut, ...]:
        """Where the graph of the first forward pass fans out, so that gradients meet; () before it."""
        return self.policy.branches or ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if active_recorder() is not None:
            return self.link(*args, **kwargs)
        scope = Scope(self.policy, self._paths, weakref.ref(self.link), self._output_dtype)
        return scope.call(self.link, args, kwargs)

    def true_gradients(self) -> dict[str, Any]:
        """Each parameter's true gradient, a new float32 array or None, by its path in the plain link."""
        return {path: _true_gradient(parameter) for path, parameter in self.link.namedparams()}

    def cleargrads(self) -> None:
        super().cleargrads()
        if not backward_state.running():
            # A hook that clears gradients while backward runs is in the middle of a step.
            self.policy.clear()

    def copy(self, mode: str = "share") -> AdaLossScaled:
        """Chainer's copy, with scales of its own: those of the original, or fresh ones in mode `init`."""
        other = super().copy(mode)
        other.policy, other._paths = ShiftPolicy(self.config, self.policy.layers), LinkPaths()
        if mode != "init":
            other.policy.load_json(self.policy.to_json())
        return other

    def copyparams(self, link: chainer.Link, copy_persistent: bool = True) -> None:
        """Copy parameters from a link, wrapped or plain; from a wrapped one the scales as well.

        Chainer's `ParallelUpdater` brings its replicas up to date this way.
        """
        wrapped = isinstance(link, AdaLossScaled)
        self.link.copyparams(link.link if wrapped else link, copy_persistent)
        if wrapped and copy_persistent:
            self.policy.load_json(link.policy.to_json())

    def namedparams(self, include_uninit: bool = True) -> Iterator[tuple[str, chainer.Parameter]]:
        """Parameters by their paths in the plain link."""
        return self.link.namedparams(include_uninit)

    def serialize(self, serializer: Any) -> None:
        self.link.serialize(serializer)
        own = serializer["ada_loss"]
        if isinstance(serializer, chainer_serializer.Serializer):
            own("state", np.frombuffer(self.policy.to_json().encode(), np.uint8))
        else:
            _load_state(own, self.policy)

    def __str__(self) -> str:
        if not self.branches:
            return super().__str__()
        branches = "".join(f"\n    {branch}" for branch in self.branches)
        return f"{super().__str__().removesuffix(')')}  (branches):{branches}\n)"

    def __getattr__(self, name: str) -> Any:
        # Only names that the wrapper itself does not have come here; before __init__ has run there is no link
        # yet.
        if name.startswith("__") or "link" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.link, name)

    def __setattr__(self, name: str, value: Any) -> None:
        link = self.__dict__.get("link")
        if link is None or name in self.__dict__ or hasattr(type(self), name) or not hasattr(link, name):
            super().__setattr__(name, value)
        else:
            setattr(link, name, value)


def _true_gradient(parameter: chainer.Parameter) -> Any:
    if isinstance(parameter, ScaledParameter):
        return parameter.true_gradient()
    return None if parameter.grad is None else parameter.grad.astype(np.float32)


def _load_state(serializer: Any, policy: ShiftPolicy) -> None:
    state = load_optional(serializer, "state")
    if state is None:
        policy.reset()
    else:
        policy.load_json(np.asarray(state).tobytes().decode())
