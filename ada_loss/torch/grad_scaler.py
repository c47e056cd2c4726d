"""`GradScaler` where `torch.amp.GradScaler` stood: gradients are scaled layer by layer within backward, and
are true when it is over."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import _refresh_per_optimizer_state

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch.backward_mode import BackwardMode, backward
from ada_loss.torch.entry_scale import EntryScaleOnDevice
from ada_loss.torch.masters import Masters
from ada_loss.torch.overflow import where_it_began
from ada_loss.torch.scaled_loss import ScaledLoss, scaled_loss
from ada_loss.torch.scaled_tensor import holds_others
from ada_loss.torch.shifts import Shifts, shifts_for

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda", "meta")
"""Types of devices that this front end computes on."""

_STATE = "ada_loss"


class GradScaler(torch.amp.GradScaler):
    """Adaptive loss scaling with the methods of `torch.amp.GradScaler`.

        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    Gradients are true, and of float32, as soon as `backward` returns: `unscale_` only looks whether they are
    finite, and `get_scale` is always 1. A step with a gradient that is not finite is skipped, and lowers all
    scales by a power of two.

    Args:
        device: type of the device; accepted as PyTorch's is, but any that computes the loss will do.
        init_scale, growth_factor, backoff_factor, growth_interval: accepted as PyTorch's are, so that calls
        can stay
            as they are; scales are found without them.
        enabled: False makes every method do what PyTorch's does then: nothing, or `optimizer.step()`.
        config: settings; `auto` if left out.

    Raises:
        ValueError: the configured method or the device is not one that this front end has.
    """

    _per_optimizer_states: dict[int, dict[str, Any]]

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        config: AdaLossConfig | None = None,
    ) -> None:
        # Scaling by 1, and where no GPU is needed; PyTorch's would otherwise disable itself without one.
        super().__init__("cpu", 1.0, growth_factor, backoff_factor, growth_interval, enabled)
        self._device = torch.device(device).type
        self._config = config or AdaLossConfig()
        self._entry = EntryScaleOnDevice.from_config(self._config)
        self._differentiations = self._entered = self._skips_seen = 0
        self._loss_finite: torch.Tensor | None = None
        self._said_no_float16 = False
        self._masters: list[tuple[torch.optim.Optimizer, Masters]] = []
        self._loaded_masters: list[dict[int, Any]] = []
        if enabled:
            _check_device(self._device)
            shifts_for(self._config, self._entry.scale)

    @property
    def skipped(self) -> int:
        """How many steps were skipped so far because a gradient was not finite. On a GPU this waits."""
        return int(self._entry.skipped)

    def scale(self, outputs: torch.Tensor | Iterable[torch.Tensor]) -> Any:
        """The loss, or losses, of the same value, whose backward pass scales.

        Raises:
            ValueError: a loss was scaled already, or is on a device that this front end does not know.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            return self._scaled(outputs)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(map(self.scale, outputs))
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if isinstance(loss, ScaledLoss):
            raise ValueError("This loss was scaled already: pass the model's own loss to GradScaler.scale().")
        _check_device(loss.device.type)
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(loss.device)
            self._entry = self._entry.to(loss.device)
        self._look_at(loss)
        return scaled_loss(loss, self)

    def _look_at(self, loss: torch.Tensor) -> None:
        """Say at once where a loss is not finite; on a GPU, that would mean waiting, when a step is
        skipped."""
        finite = torch.isfinite(loss.detach()).all()
        if loss.device.type == "cpu" and not finite:
            logger.warning(
                "The loss itself is not finite, before any gradient is computed: %s.", loss.detach()
            )
        self._loss_finite = (
            finite if self._loss_finite is None else self._loss_finite & finite.to(self._loss_finite.device)
        )

    def shifts(self) -> Shifts:
        """The rule by which gradients are scaled now."""
        return shifts_for(self._config, self._entry.scale)

    @contextmanager
    def differentiating(self) -> Iterator[BackwardMode]:
        """Around a backward pass of a loss of this scaler."""
        with backward(shifts=self.shifts()) as mode:
            yield mode
        self._differentiations += 1
        self._entered += mode.entered

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Look whether the gradients are finite. They are true already: clip them before or after."""
        if self._enabled:
            self._check_differentiated("unscale_")
            _refuse_float16_shards(optimizer)
            super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """`optimizer.step()`, unless a gradient is not finite.

        Raises:
            RuntimeError: no loss of this scaler was differentiated since the last `update`, or a parameter is
                sharded in float16.
        """
        if not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        self._check_differentiated("step")
        _refuse_float16_shards(optimizer)
        skips = self._skips_seen
        with self._masters_of(optimizer).swapped_in(optimizer):
            result = super().step(optimizer, *args, **kwargs)
        if self._skips_seen > skips:
            logger.warning("A step was skipped: %s.", self._reason(optimizer))
        return result

    def _masters_of(self, optimizer: torch.optim.Optimizer) -> Masters:
        """The masters of an optimizer; optimizers are told apart by the order of their first steps."""
        for known, masters in self._masters:
            if known is optimizer:
                return masters
        masters = Masters()
        if len(self._masters) < len(self._loaded_masters):
            masters.load_state(self._loaded_masters[len(self._masters)])
        self._masters.append((optimizer, masters))
        return masters

    def _check_differentiated(self, method: str) -> None:
        if not self._differentiations:
            raise RuntimeError(
                f"GradScaler.{method}() has no gradients to go by: since the last update() no loss was "
                "differentiated with scaler.scale(loss).backward()."
            )
        if not self._entered and not self._said_no_float16:
            self._said_no_float16 = True
            warnings.warn(
                "No gradient of this model is in float16, so there is nothing to scale: run the forward pass "
                "under torch.autocast(device, torch.float16), or convert the model with half().",
                stacklevel=3,
            )

    def _maybe_opt_step(
        self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any
    ) -> float | None:
        if not sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
            return optimizer.step(*args, **kwargs)
        self._skips_seen += 1
        return None

    def _reason(self, optimizer: torch.optim.Optimizer) -> str:
        if self._loss_finite is not None and not self._loss_finite:
            return "the loss itself was not finite"
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return f"the loss was finite, but {where_it_began(parameters)}"

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Lower all scales after a step that was skipped; after many good ones raise them again.

        new_scale: not for this scaler, whose scales are found.

        Raises:
            ValueError: a new scale was given.
        """
        if not self._enabled:
            return
        if new_scale is not None:
            raise ValueError("update() takes no new scale: this scaler finds its scales layer by layer.")
        self._check_scale_growth_tracker("update")
        found = [
            found.to(self._entry.exponent.device, non_blocking=True)
            for state in self._per_optimizer_states.values()
            for found in state["found_inf_per_device"].values()
        ]
        if not found:
            raise AssertionError("No inf checks were recorded prior to update.")
        self._entry = self._entry.after(sum(found) > 0)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        self._differentiations = self._entered = 0
        self._loss_finite = None

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's entries, what decides the next scales, and the masters of float16 parameters with what
        optimizers know of them."""
        if not self._enabled:
            return {}
        state = {"entry": self._entry.to_state()}
        masters = self._states_of_masters()
        # Without any, a state has the same entries before the first step as after: distributed checkpoints
        # load into the state of a new scaler.
        return super().state_dict() | {_STATE: state | ({"masters": masters} if any(masters) else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was called. Of a state of `torch.amp.GradScaler` there is nothing to
        take."""
        super().load_state_dict(state_dict | {"scale": 1.0} if state_dict else state_dict)
        if self._enabled and _STATE in state_dict:
            self._entry = self._entry.restored(state_dict[_STATE]["entry"])
            self._loaded_masters = list(state_dict[_STATE].get("masters", [{} for _ in self._masters]))
            for (_, masters), state in zip(self._masters, self._loaded_masters, strict=False):
                masters.load_state(state)

    def __getstate__(self) -> dict[str, Any]:
        """Without optimizers, which are pickled by whoever holds them."""
        state = super().__getstate__()
        return state | {"_loaded_masters": self._states_of_masters(), "_masters": []}

    def _states_of_masters(self) -> list[dict[int, Any]]:
        """In the order in which optimizers made their first steps, here or where they were loaded from."""
        states = [masters.to_state(optimizer) for optimizer, masters in self._masters]
        return states + self._loaded_masters[len(states) :]


def _refuse_float16_shards(optimizer: torch.optim.Optimizer) -> None:
    """Sharded parameters of float16 have no masters."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        sharded = holds_others((type(parameter),))
        if sharded and parameter.dtype == torch.float16 and parameter.grad is not None:
            raise RuntimeError(
                "A sharded parameter is in float16, where updates would be lost: keep parameters in float32, "
                "and let FSDP2 cast them with MixedPrecisionPolicy(param_dtype=torch.float16, "
                "reduce_dtype=torch.float32)."
            )


def _check_device(kind: str) -> None:
    if kind not in DEVICES:
        raise ValueError(
            f"ada_loss.torch computes on CPUs and on CUDA or ROCm GPUs, not on {kind!r}: use "
            "torch.amp.GradScaler there."
        )
