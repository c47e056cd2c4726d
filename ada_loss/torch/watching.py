"""Watching a model in PyTorch: what every layer's gradients and results are like on sampled steps.

Results are seen by hooks on modules, gradients by hooks on what goes into a module: gradients of float16
values, however they are scaled. What float32 has is computed afterwards, from the same inputs and the same
gradient of the model's result: once more forward and backward, without autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map

from ada_loss.core.histogram import Histogram, merge
from ada_loss.core.maths import floor_log2
from ada_loss.core.recorder import Recorder
from ada_loss.core.records import (
    ACTIVATION,
    BIAS_GRADIENT,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Place,
)
from ada_loss.torch.scaled_tensor import ScaledTensor


@dataclass
class _Seen:
    """What came by a place in one step: several arrays where it is used several times.

    histograms: of true values. exponent: what the first carried. zeros: for each array, which elements are
    zero, eight to a byte, and how many there are.
    """

    exponent: int
    histograms: list[Histogram] = field(default_factory=list)
    zeros: list[tuple[Any, int]] = field(default_factory=list)


class Watch:
    """Tells a recorder what goes on in a model.

    Args:
        model: any module.
        recorder: whom to tell. It says which steps are sampled.
        scale: tells the loss scale that gradients carry, of `torch.amp.GradScaler` for instance.
        truth: whether to compute what float32 has.
        wide: whether results in float32 are of interest, and not those in float16.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recorder: Recorder,
        *,
        scale: Callable[[], float] = lambda: 1.0,
        truth: bool = True,
        wide: bool = False,
    ) -> None:
        self.model = model
        self.recorder = recorder
        self._scale = scale
        self._truth = truth
        self._dtype = torch.float32 if wide else torch.float16
        self._handles: list[Any] = []
        self._seen: dict[Place, _Seen] = {}
        self._call: _Call | None = None

    def begin(self) -> None:
        """Watch the step that begins, if it is sampled."""
        if self._handles or not self.recorder.sampling:
            return
        self._seen, self._call = {}, None
        for path, module in self.model.named_modules():
            if not any(True for _ in module.children()):
                self._handles += [
                    module.register_forward_pre_hook(_inputs(self._gradient, path)),
                    module.register_forward_hook(_results(self._result, path)),
                ]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(_of(self._gradient, Place(name, _kind(name)))))
        if self._truth:
            self._handles += [
                self.model.register_forward_pre_hook(self._before_call, with_kwargs=True),
                self.model.register_forward_hook(self._after_call),
            ]

    def end(self) -> None:
        """Tell what was seen, and watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        true = self._call.gradients(self.model) if self._call is not None else {}
        for place, seen in self._seen.items():
            reference = true.get(place)
            same = reference is not None and [a.size for a in reference] == [n for _, n in seen.zeros]
            self.recorder.observe(
                place,
                merge(seen.histograms),
                exponent=seen.exponent,
                lost=_lost(seen, reference) if same and reference is not None else None,
                reference=merge([Histogram.of(a) for a in reference]) if same and reference else None,
            )
        self._seen, self._call = {}, None

    def _result(self, place: Place, result: Any) -> None:
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and value.dtype == self._dtype:
                seen = self._seen.setdefault(place, _Seen(0))
                seen.histograms.append(Histogram.of(_array(value)))

    def _gradient(self, place: Place, gradient: torch.Tensor) -> None:
        if gradient.layout != torch.strided or not gradient.is_floating_point():
            return
        if isinstance(gradient, ScaledTensor):
            data, scale = gradient.scaled_data, float(gradient.scale)
        else:
            data, scale = gradient, float(self._scale())
        power = floor_log2(scale)
        array = _array(data)
        if scale != 2.0**power:
            array = array.astype(np.float32) / np.float32(scale / 2.0**power)
        seen = self._seen.setdefault(place, _Seen(power))
        seen.histograms.append(Histogram.of(array, power))
        seen.zeros.append((np.packbits(array.reshape(-1) == 0), array.size))

    def _before_call(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._call is None and torch.is_grad_enabled():
            self._call = _Call(args, kwargs, torch.get_rng_state())

    def _after_call(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        call = self._call
        if call is None or call.results:
            return
        for number, value in enumerate(tree_flatten(result)[0]):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                call.results[number] = None
                value.register_hook(lambda g, number=number: call.keep(number, g, self._scale()))


@dataclass
class _Call:
    """A call of the model: what it was given, and the true gradients of its results, by number."""

    args: Any
    kwargs: Any
    random: torch.Tensor
    results: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def keep(self, number: int, gradient: torch.Tensor, scale: float) -> None:
        """Take note of the gradient of a result."""
        scaled = isinstance(gradient, ScaledTensor)
        true = gradient.to_true() if isinstance(gradient, ScaledTensor) else gradient.float()
        self.results[number] = true.detach() if scaled else (true / scale).detach()

    def gradients(self, model: torch.nn.Module) -> dict[Place, list[Any]]:
        """What every place has in float32, as arrays, in the order of the backward pass."""
        found: dict[Place, list[Any]] = {}

        def take(place: Place, gradient: torch.Tensor) -> None:
            found.setdefault(place, []).append(_array(gradient.float()))

        known = {number: g for number, g in self.results.items() if g is not None}
        if not known or any(p.dtype == torch.float16 for p in model.parameters()):
            return {}
        with (
            _unchanged(model),
            torch.random.fork_rng(),
            _autocast_off(),
            torch.enable_grad(),
            ExitStack() as stack,
        ):
            torch.set_rng_state(self.random)
            for path, module in model.named_modules():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_pre_hook(_inputs(take, path)).remove)
            result = model(*tree_map(_wide, self.args), **tree_map(_wide, self.kwargs))
            outputs = [tree_flatten(result)[0][number] for number in known]
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            starts = [g.to(y.dtype) for g, y in zip(known.values(), outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, list(named.values()), starts, allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None and gradient.layout == torch.strided:
                take(Place(name, _kind(name)), gradient)
        return found


def _lost(seen: _Seen, reference: Iterable[Any]) -> int:
    """How many elements are zero and should not be."""
    return sum(
        int(np.count_nonzero(np.unpackbits(bits, count=size).astype(bool) & (true.reshape(-1) != 0)))
        for (bits, size), true in zip(seen.zeros, reference, strict=True)
    )


def _inputs(take: Callable[[Place, torch.Tensor], None], path: str) -> Callable[..., Any]:
    """A hook that has the gradients of a module's own inputs taken, of float values only."""
    place = Place(path or "/", INPUT_GRADIENT)

    def watched(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.requires_grad or not value.is_floating_point():
            return value
        # A view of its own: other uses of the value have gradients of their own.
        alias = value.view_as(value)
        alias.register_hook(_of(take, place))
        return alias

    def hook(module: torch.nn.Module, args: Any) -> Any:
        return None if getattr(module, "inplace", False) else tree_map(watched, args)

    return hook


def _results(take: Callable[[Place, Any], None], path: str) -> Callable[..., None]:
    place = Place(path or "/", ACTIVATION)
    return lambda module, args, result: take(place, result)


def _of(take: Callable[[Place, torch.Tensor], None], place: Place) -> Callable[[torch.Tensor], None]:
    return lambda gradient: take(place, gradient)


def _kind(name: str) -> str:
    return BIAS_GRADIENT if name.rpartition(".")[2].startswith("bias") else WEIGHT_GRADIENT


def _array(tensor: torch.Tensor) -> Any:
    """A tensor as an array; of bfloat16 in float32."""
    plain = tensor.detach()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    return plain.cpu().numpy()


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


@contextmanager
def _autocast_off() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model may be called without leaving a trace in its buffers."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
