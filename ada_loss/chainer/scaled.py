"""`AdaLossScaled`: makes the gradients of a model find their own scales."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import chainer
import numpy as np
from chainer import serializer as chainer_serializer

from ada_loss.chainer import backward_state, engine, ownership
from ada_loss.chainer.made_classes import become, made_class, picklable, plain_class
from ada_loss.chainer.parameters import ScaledParameter
from ada_loss.chainer.parts import Filter, Layers, parts_of
from ada_loss.chainer.policy import ChainerPolicy
from ada_loss.chainer.running_statistics import Watched
from ada_loss.chainer.scaling import Scaling
from ada_loss.chainer.settings import config_of, dtype_of_results, require_link, require_parts
from ada_loss.chainer.snapshot import load_optional
from ada_loss.chainer.tagging import active_recorder, named_links

NAME = "ada_loss"
"""The one name that a scaled model has besides its own: of its attribute, and of its state in saved files."""

OWN_METHOD = "true_gradients"
"""The one method that a scaled model has besides its own, unless it has one of that name."""

_FORMER_NAMES = {
    "branches": "fan_outs",
    "config": "config",
    "decisions": "decisions",
    "policy": "policy",
    "report": "report",
}


def _new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`__new__` of a scaled model's class: that of the model's own."""
    plain_new: Any = super(AdaLossScaled, cls).__new__
    return plain_new(cls) if plain_new is object.__new__ else plain_new(cls, *args, **kwargs)


class AdaLossScaled(Watched, chainer.Link):
    """`AdaLossScaled(link)` makes a link's gradients carry scales of their own, chosen layer by layer.

    Args:
        link: any link. Its layers become scaled variants, in place.
        loss_scale_method: the rule, see `AdaLossConfig`, which also describes the other `settings`.
        filter: which layers to scale, all of them by default. A function (path, link) -> bool, which refuses
            whatever is below a link with the link; or one or several patterns of paths, such as "/body/*", or
            "!/head" for all but that link and what is below it.
        layers: settings of parts, by pattern, as in {"/head": {"loss_scale_method": "fixed"}}. With an
            `init_scale` of its own a fixed scale holds in that part, whatever gradients arrive with.
        output_dtype: float16 results are cast to it, None leaves them float16. The loss is then computed in
            float32, and the gradients that enter are scaled before they are rounded.
        settings: any field of `AdaLossConfig`.

    Returns:
        The very link, which has a class made of this one and its own from now on. Its methods, attributes,
        paths and saved files stay what they are. What this package knows of it is in `link.ada_loss`, see
        `Scaling`; saved, that is beside the link's own entries under `ada_loss/`.

    Raises:
        TypeError: `link` is no link, or there is no setting of a name.
        ValueError: a setting is wrong, the link is scaled already, or it has an attribute `ada_loss`.

    The graph decides what is scaled, whatever computed a loss: functions that the link's call applied, that
    use a parameter of the link, or float16 results of these. Inside another scaled model it is just a link.

    In float32 gradients equal those of the plain link bit for bit. A function of your own is handed the true
    gradient there. In float16 it has to be linear in its gradient, as every one of Chainer's is, or the true
    gradient has to be one that float16 holds; otherwise a RuntimeError names it.

    The parameters' gradients stay scaled until an optimizer that `ada_loss.chainer.prepare` has prepared asks
    for them.
    """

    ada_loss: Scaling

    MADE_MEMBERS: ClassVar[dict[str, Any]] = {"__new__": _new}
    """Members of the classes of scaled models; see `made_class`."""

    def __new__(
        cls,
        link: Any,
        loss_scale_method: str = "auto",
        *,
        filter: Filter | None = None,
        layers: Layers | None = None,
        output_dtype: Any = "float32",
        **settings: Any,
    ) -> Any:
        config, dtype = config_of(loss_scale_method, settings), dtype_of_results(output_dtype)
        require_parts(filter, layers)
        _check(link)
        parts = parts_of(named_links(link), filter, layers, config)
        engine.install()
        become(link, _scaled_class(cls, type(link)))
        vars(link)[NAME] = Scaling(ChainerPolicy(config, parts), dtype)
        ownership.register(link)
        ownership.claim()
        return link

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Python initializes what `AdaLossScaled(link)` returns, as if it were new.
        if any(argument is self for argument in (*args[:1], kwargs.get("link"))):
            return
        super().__init__(*args, **kwargs)
        plain = plain_class(type(self))
        if NAME not in vars(self) and plain is not None:
            # The model has made another of its own kind, which nobody has scaled.
            become(self, plain)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that is made here is no subclass that the model's own would want to know of.
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active_recorder() is not None:
            return super().__call__(*args, **kwargs)
        return self.ada_loss.scope(self).call(super().__call__, args, kwargs)

    def true_gradients(self) -> dict[str, Any]:
        """Each parameter's true gradient, a new float32 array or None, by its path."""
        return {path: _true_gradient(parameter) for path, parameter in self.namedparams()}

    def cleargrads(self) -> None:
        super().cleargrads()
        if not backward_state.running():
            # A hook that clears gradients while backward runs is in the middle of a step.
            self.ada_loss.policy.clear()

    def copy(self, mode: str = "share") -> Any:
        """Chainer's copy, with scales of its own: those of the original, or fresh ones in mode `init`."""
        other = super().copy(mode)
        if not isinstance(other, AdaLossScaled):
            # `Sequential` copies into a new one.
            become(other, _scaled_class(AdaLossScaled, type(other)))
        vars(other)[NAME] = self.ada_loss.copied(fresh=mode == "init")
        ownership.register(other)
        return other

    def copyparams(self, link: chainer.Link, copy_persistent: bool = True) -> None:
        """Copy parameters from a link, scaled or plain; from a scaled one the scales as well.

        Chainer's `ParallelUpdater` brings its replicas up to date this way.
        """
        super().copyparams(link, copy_persistent)
        if isinstance(link, AdaLossScaled) and copy_persistent:
            self.ada_loss.policy.load_json(link.ada_loss.policy.to_json())

    def serialize(self, serializer: Any) -> None:
        super().serialize(serializer)
        own = serializer[NAME]
        if isinstance(serializer, chainer_serializer.Serializer):
            own("state", np.frombuffer(self.ada_loss.policy.to_json().encode(), np.uint8))
        else:
            _load_state(own, self.ada_loss.policy)

    def __str__(self) -> str:
        text = super().__str__()
        fan_outs = "".join(f"\n    {fan_out}" for fan_out in self.ada_loss.fan_outs)
        return f"{text.removesuffix(')')}  (fan-outs):{fan_outs}\n)" if fan_outs else text

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        return _rescaled, (self.ada_loss, *picklable(make, arguments)), *state

    def __getattr__(self, name: str) -> Any:
        own = getattr(super(), "__getattr__", None)
        try:
            # Without a `__getattr__` of the model's own: what has led here, a property that raised perhaps.
            return own(name) if own else super().__getattribute__(name)
        except AttributeError:
            if name == "link" and not self.within_init_scope:
                warnings.warn(
                    "AdaLossScaled(link) returns the link itself: leave out .link",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return self
            if name in _FORMER_NAMES and not self.within_init_scope:
                raise AttributeError(
                    f".{name} of a scaled model is .ada_loss.{_FORMER_NAMES[name]}"
                ) from None
            raise


def _scaled_class(front: type, plain: type) -> type:
    """The class of a scaled model whose own is `plain`."""
    made: Any = made_class(front, plain)
    own = inspect.getattr_static(plain, OWN_METHOD, None)
    if own is not None:
        setattr(made, OWN_METHOD, own)
    return made


def _rescaled(scaling: Scaling, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A copy of a scaled model, as pickle and deepcopy make it."""
    engine.install()
    link = make(*arguments)
    if not isinstance(link, AdaLossScaled):
        become(link, _scaled_class(AdaLossScaled, type(link)))
    vars(link)[NAME] = scaling
    ownership.register(link)
    return link


def _check(link: Any) -> None:
    """Whether a link can be scaled."""
    require_link(link)
    if isinstance(link, AdaLossScaled):
        raise ValueError("This link is scaled already: call AdaLossScaled once.")
    if ownership.holder_of(link) is not None:
        # A model that refers to itself, and that nobody uses any more, may still be there.
        gc.collect()
    holder = ownership.holder_of(link)
    if holder is not None:
        model, path = holder
        raise ValueError(
            f"This link is {path} of a model that is scaled already, {type(model).__name__}: for settings of "
            f"its own give AdaLossScaled layers={{{path!r}: ...}} there."
        )
    if inspect.getattr_static(link, NAME, None) is not None:
        raise ValueError(
            f"{type(link).__name__} has an attribute {NAME!r}, the one name that AdaLossScaled needs: "
            "give it another."
        )


def _true_gradient(parameter: chainer.Parameter) -> Any:
    if isinstance(parameter, ScaledParameter):
        return parameter.true_gradient()
    return None if parameter.grad is None else parameter.grad.astype(np.float32)


def _load_state(serializer: Any, policy: ChainerPolicy) -> None:
    state = load_optional(serializer, "state")
    if state is None:
        policy.reset()
    else:
        policy.load_json(np.asarray(state).tobytes().decode())
