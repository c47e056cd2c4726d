"""float32 masters of float16 parameters: what an optimizer really updates.

For the duration of one `optimizer.step()` the masters take the places of float16 parameters in the
optimizer's groups and in its state, with the true gradients, which are of float32. Then the parameters
receive the rounded masters, in place. Between steps the optimizer holds the model's own parameters, as its
state_dict expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, Any]


class Masters:
    """The masters of one optimizer's parameters, by their place among all of its parameters."""

    def __init__(self) -> None:
        self._masters: dict[int, torch.nn.Parameter] = {}
        self._loaded: dict[int, State] = {}

    @contextmanager
    def swapped_in(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around a step of the optimizer."""
        swapped = []
        place = 0
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.dtype == torch.float16:
                    master = self._master_of(place, parameter)
                    self._give_state(place, optimizer, parameter, master)
                    group["params"][index] = master
                    swapped.append((group["params"], index, parameter, master))
                place += 1
        try:
            yield
        finally:
            for parameters, index, parameter, master in swapped:
                parameters[index] = parameter
                _move_state(optimizer, master, parameter)
                _round(master, parameter)

    def _master_of(self, place: int, parameter: torch.Tensor) -> torch.nn.Parameter:
        """The parameter's master; its own value where that is no longer the rounded master, because a file
        was loaded or somebody changed it."""
        value = parameter.detach().float()
        master = self._masters.get(place)
        if master is None or master.shape != value.shape:
            master = torch.nn.Parameter(value, parameter.requires_grad)
        else:
            followed = master.detach().to(value.device)
            master.data = torch.where(followed.half() == parameter.detach(), followed, value)
        self._masters[place] = master
        master.grad = _in_float32(parameter.grad)
        return master

    def _give_state(
        self, place: int, optimizer: Any, parameter: torch.Tensor, master: torch.nn.Parameter
    ) -> None:
        """The optimizer's state of a parameter becomes its master's, in float32.

        PyTorch rounds it to float16 where an optimizer loads it; what `load_state` was given is not rounded.
        """
        _move_state(optimizer, parameter, master)
        loaded = self._loaded.pop(place, {})
        state = optimizer.state.get(master, {})
        # Some optimizers make their state before the first step.
        is_new = "step" in state and not state["step"]
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float16:
                continue
            if name not in loaded and not is_new:
                raise RuntimeError(
                    f"The optimizer's {name!r} of a float16 parameter was rounded to float16 when it was "
                    "loaded: load the GradScaler's state_dict of the same checkpoint as well."
                )
            state[name] = loaded[name].to(value.device) if name in loaded else value.float()

    def to_state(self, optimizer: Any) -> dict[int, State]:
        """The masters, and the optimizer's state of them."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {
            place: {
                "master": master.detach(),
                "state": {
                    name: value
                    for name, value in optimizer.state.get(parameters[place], {}).items()
                    if isinstance(value, torch.Tensor) and value.dtype == torch.float32
                }
                | self._loaded.get(place, {}),
            }
            for place, master in self._masters.items()
        }

    def load_state(self, states: dict[int, State]) -> None:
        """Go on where `to_state` was called."""
        self._masters = {int(p): torch.nn.Parameter(s["master"].clone()) for p, s in states.items()}
        self._loaded = {int(place): dict(state["state"]) for place, state in states.items()}


def _in_float32(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient.float() if gradient is not None and gradient.dtype == torch.float16 else gradient


def _move_state(optimizer: Any, source: torch.Tensor, target: torch.Tensor) -> None:
    if source in optimizer.state:
        optimizer.state[target] = optimizer.state.pop(source)


@torch.no_grad()
def _round(master: torch.Tensor, parameter: torch.Tensor) -> None:
    parameter.copy_(master)
    master.grad = None
