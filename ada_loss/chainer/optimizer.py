"""What a prepared optimizer is: one that hands true float32 gradients to hooks and updates."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any

import chainer
import numpy as np

from ada_loss.arrays.library import all_finite, cast
from ada_loss.chainer import backward_state, origin, running_statistics
from ada_loss.chainer.advice import tell_what_is_missing
from ada_loss.chainer.masters import true_gradients_on_masters
from ada_loss.chainer.origin import Skip
from ada_loss.chainer.own_updates import require_step
from ada_loss.chainer.ownership import claim, scaled_models
from ada_loss.chainer.parameters import ScaledParameter, adopt
from ada_loss.chainer.scaling import Scaling
from ada_loss.chainer.snapshot import load_optional
from ada_loss.core.entry_scale import EntryScale

_logger = logging.getLogger("ada_loss")


class Diverged(RuntimeError):
    """Steps keep overflowing although the entry scale cannot be lowered any more."""


class PreparedOptimizer:
    """What `prepare` puts in front of an optimizer's class; `StepOnMasters` comes behind it."""

    target: Any
    _loss_scale: float | None
    _loss_scaling_is_dynamic: bool

    last_skip: Skip | None = None
    """Why the last update was skipped; None if it was not."""

    foreseen_skip: Skip | None = None
    """Why the next update will be skipped, where other processes have told it already."""

    _stepping = False
    """Whether a step is being taken."""

    announces = True
    """Whether this process logs skipped steps; in a distributed training the first rank does."""

    @property
    def entry_scale(self) -> EntryScale:
        """The entry scale: `.exponent` is its log2 now, `.skipped` the number of steps skipped so far.

        Of the first scope, if the model has several.
        """
        return scopes(self.target)[0].policy.entry

    @property
    def overflow(self) -> EntryScale:
        """The deprecated name of `entry_scale`."""
        warnings.warn(
            "optimizer.overflow is now called optimizer.entry_scale.", DeprecationWarning, stacklevel=2
        )
        return self.entry_scale

    def setup(self, link: chainer.Link) -> Any:
        require_scopes(link)
        super().setup(link)  # type: ignore[misc]
        look_after(link)
        running_statistics.watch(link)
        return self

    def reallocate_cleared_grads(self) -> None:
        """As Chainer's, but without a look at the gradients, which would make them all at once."""
        chainers = super().reallocate_cleared_grads  # type: ignore[misc]
        if chainers.__func__ is not chainer.GradientMethod.reallocate_cleared_grads:
            chainers()
            return
        for _, parameter in self.target.namedparams(False):
            adopt(parameter).fill()

    def check_nan_in_grads(self) -> None:
        """Nothing is left to find: an update that comes here has finite gradients."""
        if not self._stepping:
            raise RuntimeError(
                f"{type(self).__name__} calls GradientMethod.update by its name: call "
                "super().update(), so that the step is taken with true gradients."
            )
        self._loss_scaling_isnan = False

    def serialize(self, serializer: Any) -> None:
        saving = isinstance(serializer, chainer.Serializer)
        if saving:
            self._initialize_states()
        super().serialize(serializer)  # type: ignore[misc]
        own = serializer["ada_loss"]
        (self._save if saving else self._load)(own)
        _widen_states(self.target)

    def __reduce__(self) -> Any:
        # This class was made on the fly: pickle finds it by those that it was made of.
        return _new_prepared, type(self).__bases__[:2], vars(self)

    def _save(self, serializer: Any) -> None:
        for path, parameter in self.target.namedparams():
            if isinstance(parameter, ScaledParameter) and parameter.master is not None:
                serializer(f"master{path}", parameter.master)
            for name, number in _numbers(parameter.update_rule).items():
                serializer(f"rule{path}/{name}", np.array(number))
        if self._loss_scaling_is_dynamic:
            serializer("loss_scale", np.array([self._loss_scale, self._loss_scaling_isnan_ever], np.float64))

    def _load(self, serializer: Any) -> None:
        # The parameters are loaded after this, and may be uninitialized until then.
        for path, parameter in self.target.namedparams():
            master = load_optional(serializer, f"master{path}")
            adopt(parameter).master = None if master is None else parameter.device.send(np.asarray(master))
            for name in _numbers(parameter.update_rule):
                number = load_optional(serializer, f"rule{path}/{name}")
                if number is not None:
                    setattr(parameter.update_rule, name, float(number))
        state = load_optional(serializer, "loss_scale")
        if self._loss_scaling_is_dynamic and state is not None:
            self._loss_scale, self._loss_scaling_isnan_ever = float(state[0]), bool(state[1])

    def _looked_at_again(self) -> set[int]:
        """ids of the parameters whose gradient may be looked at after their update: by a hook, or by one more
        update of a parameter that the model holds twice."""
        times = Counter(id(parameter) for parameter in self.target.params())
        hooks = self._hookable._post_update_hooks  # type: ignore[attr-defined]
        return {key for key, count in times.items() if hooks or count > 1}

    def _initialize_states(self) -> None:
        """Give every update rule its state, as its first update will: Chainer cannot load a snapshot
        without."""
        for parameter in unique_parameters(self.target):
            rule = parameter.update_rule
            if rule is not None and rule.enabled and rule.state is None and parameter.is_initialized:
                with chainer.using_device(parameter.device):
                    wide = parameter.array.astype(np.promote_types(parameter.dtype, np.float32))
                    rule._init_states(chainer.Parameter(wide))

    def _answer_overflow(self, skip: Skip) -> None:
        entries = [scope.policy.entry for scope in scopes(self.target)]
        if all(entry.diverged for entry in entries):
            what = (
                f"overflowed even at the smallest scale, 2**{entries[0].exponent}"
                if skip.scale_helps
                else "were not finite on the forward pass, where no scale helps"
            )
            raise Diverged(
                f"Training diverged: {entries[0].overflows} steps in a row {what}; in the last one "
                f"{skip.reason}. Lower the learning rate, or look for what makes the loss infinite."
            )
        if self.announces:
            _logger.warning(
                "Skipped a step, %d so far: %s. The scale %s 2**%d.",
                entries[0].skipped,
                skip.reason,
                "becomes" if skip.scale_helps else "stays",
                entries[0].exponent,
            )


def take_over(optimizer: Any) -> None:
    """Watch the optimizer's model, and keep what it has from updates before it is prepared: float32 copies of
    parameters, from `use_fp32_update`, become masters, and float16 state becomes float32."""
    running_statistics.watch(optimizer.target)
    for parameter in unique_parameters(optimizer.target):
        copied = getattr(parameter.update_rule, "_fp32_param", None)
        if parameter.master is None and copied is not None:
            # Where the parameter is no longer what this rounds to, the parameter will decide.
            parameter.master = copied.array
    _widen_states(optimizer.target)


def _widen_states(target: chainer.Link) -> None:
    """Make float16 state of update rules float32, as of a training that updated float16 parameters itself.

    In float16 Adam's second moments of most gradients are zero, whatever follows them.
    """
    for parameter in unique_parameters(target):
        state = getattr(parameter.update_rule, "state", None) or {}
        for name, value in state.items():
            if getattr(value, "dtype", None) == np.float16:
                state[name] = cast(value, np.float32)


class StepOnMasters(chainer.GradientMethod):
    """Chainer's update as a prepared optimizer takes it, behind an `update` of the optimizer's own.

    A step whose gradients are not all finite is skipped: no hook runs, no parameter, state or counter
    changes, a warning is logged, and the entry scales of the model's scopes back off, where a smaller scale
    may help. Otherwise the whole update, hooks included, runs on the float32 masters with the true gradients,
    and the float16 parameters receive the rounded result.
    """

    def update(self, lossfun: Any = None, *args: Any, **kwargs: Any) -> None:
        running_statistics.watch(self.target)
        try:
            self._step(lossfun, args, kwargs)
        finally:
            running_statistics.end()
            origin.end()

    def _step(self, lossfun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loss = None if lossfun is None else compute_gradients(self, lossfun, args, kwargs)
        parameters = unique_parameters(self.target)
        finite = all_finite([array for parameter in parameters for array in parameter.arrays()])
        self.last_skip, self.foreseen_skip = None if finite else self._why(parameters), None
        # Until now its graph could tell where numbers stopped being finite.
        del loss
        if finite:
            self._stepping = True
            try:
                with true_gradients_on_masters(parameters, keep=self._looked_at_again()):
                    super().update()
            finally:
                self._stepping = False
        else:
            running_statistics.undo()
            self._loss_scaling_isnan = self._loss_scaling_isnan_ever = True
            self.update_loss_scale()
        if self.announces:
            tell_what_is_missing(self.target, scopes(self.target))
        own = {scope.policy for scope in scopes(self.target)}
        scale_helps = self.last_skip is None or self.last_skip.scale_helps
        for policy in own:
            policy.end_step(finite=finite, scale_helps=scale_helps)
        entered = backward_state.take_entered()
        if self.last_skip is not None:
            # These gradients came by way of scopes that another optimizer looks after, as in a GAN.
            for policy in entered - own:
                policy.entry = policy.entry.after(finite=False, scale_helps=scale_helps)
            self._answer_overflow(self.last_skip)

    def _why(self, parameters: list[ScaledParameter]) -> Skip:
        """Why a step is skipped that leaves these parameters with gradients that are not finite."""
        if self.foreseen_skip is not None:
            return self.foreseen_skip
        return origin.reason(self.target, [p for p in parameters if not all_finite(p.arrays())])


def _numbers(rule: Any) -> dict[str, float]:
    """What an update rule keeps as plain numbers, such as MSVAG's power of beta: Chainer saves only its
    arrays."""
    return {} if rule is None else {name: x for name, x in vars(rule).items() if isinstance(x, float)}


def prepare_step(optimizer: Any) -> None:
    """Prepare an optimizer that takes the step itself."""
    require_step(optimizer)
    prepare_in_place(optimizer, PreparedOptimizer)
    take_over(optimizer)


def prepare_in_place(optimizer: Any, mixin: type) -> None:
    """Put a mixin in front of an optimizer's class; once is enough."""
    if not isinstance(optimizer, mixin):
        object.__setattr__(optimizer, "__class__", _prepared_class(mixin, type(optimizer)))


_PREPARED: dict[tuple[type, type], type] = {}

_RATES = ("lr", "alpha_t")
"""Properties by which Chainer's optimizers tell a learning rate that depends on `t`."""


def _prepared_class(mixin: type, plain: type) -> type:
    if (mixin, plain) not in _PREPARED:
        members = {
            name: _answered_before_the_first_update(rate)
            for name in _RATES
            if isinstance(rate := getattr(plain, name, None), property)
        }
        behind = (StepOnMasters,) if issubclass(plain, chainer.GradientMethod) else ()
        _PREPARED[mixin, plain] = type(f"Prepared{plain.__name__}", (mixin, plain, *behind), members)
    return _PREPARED[mixin, plain]


def _answered_before_the_first_update(rate: Any) -> property:
    """A learning rate that an optimizer computes from `t`, as Adam does; at t = 0 that of the first update.

    Skipped steps do not count, so `t` may be 0 when an extension such as `observe_lr` asks.
    """

    def read(optimizer: Any) -> Any:
        if optimizer.t:
            return rate.fget(optimizer)
        optimizer.t = 1
        try:
            return rate.fget(optimizer)
        finally:
            optimizer.t = 0

    return property(read, rate.fset, rate.fdel, rate.__doc__)


def _new_prepared(mixin: type, plain: type) -> Any:
    return object.__new__(_prepared_class(mixin, plain))


def compute_gradients(
    optimizer: Any, lossfun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> chainer.Variable:
    """Evaluate the loss and run backward, as Chainer's optimizers do when their update is given a loss
    function; returns the loss."""
    running_statistics.begin(optimizer.target)
    loss = lossfun(*args, **kwargs)
    if getattr(optimizer, "_use_cleargrads", True):
        optimizer.target.cleargrads()
    else:
        optimizer.target.zerograds()
    loss.backward(loss_scale=optimizer._loss_scale)
    return loss


def scopes(target: chainer.Link) -> list[Scaling]:
    """What is kept on the scaled models that a link holds or is a part of."""
    return list(named_scopes(target).values())


def named_scopes(target: chainer.Link) -> dict[str, Scaling]:
    """What is kept on the scaled models that a link holds, each once, by the model's path; of one that the
    link is a part of, by the path of the first parameter that is in it."""
    return {path: model.ada_loss for path, model in scaled_models(target).items()}


def require_scopes(target: chainer.Link) -> None:
    """A ValueError if a link holds no scaled model and is part of none."""
    claim()
    if not scopes(target):
        raise ValueError(
            "The optimizer's model holds no AdaLossScaled: wrap the model before optimizer.setup(model)."
        )


def look_after(target: chainer.Link) -> None:
    """Make a link's parameters hold scaled gradients, and its steps end where an optimizer says so."""
    unique_parameters(target)
    for scope in scopes(target):
        scope.policy.stepped = True


def unique_parameters(target: chainer.Link) -> list[ScaledParameter]:
    """A link's parameters, each once, ordered by path; all of them can hold scaled gradients from now
    on."""
    return list({id(parameter): adopt(parameter) for _, parameter in sorted(target.namedparams())}.values())
