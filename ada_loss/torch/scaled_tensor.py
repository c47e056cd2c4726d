"""A gradient in flight: float16 data and the power of two by which it is scaled.

The scale is a 0-dim tensor on the data's device, so that nothing waits for a GPU. It is of float64, whose
range the scales of a whole network cannot leave, and a multiplication by it is exact unless the result leaves
the range of its own format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch

from ada_loss.core.formats import FLOAT16
from ada_loss.torch.shifts import Shifts, factor_to, over, times
from ada_loss.torch.statistics import finite_peak


class Family:
    """What a tensor and its views have in common: one scale, and the data that all of them look at.

    factor: by which data that are not rounded yet are multiplied when they are; None before.
    """

    __slots__ = ("factor", "root", "scale", "shifts")

    def __init__(self, root: torch.Tensor, scale: torch.Tensor, shifts: Shifts) -> None:
        self.root = root
        self.scale = scale
        self.factor: torch.Tensor | None = None
        self.shifts = shifts


class ScaledTensor(torch.Tensor):
    """A tensor whose value is `scaled_data / scale`, shown to autograd as a tensor of the data's dtype.

    Whatever is computed from it follows the operators' rules (`ada_loss.torch.operators`); an operator
    without one sees the value, never the scaled data.

    scaled_data: a plain tensor, the value times the scale; of float32 where it is to be rounded later on.
    scale: a power of two, 0-dim, of float64.
    shown_dtype: that of the rounded data, which autograd sees.
    shifts: the rule by which results of further operators are scaled.
    """

    scaled_data: torch.Tensor
    shown_dtype: torch.dtype
    family: Family

    @staticmethod
    def __new__(
        cls,
        data: torch.Tensor,
        scale: torch.Tensor,
        shifts: Shifts,
        *,
        family: Family | None = None,
        dtype: torch.dtype | None = None,
    ) -> ScaledTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=dtype or data.dtype,
            device=data.device,
        )
        # Code that reads memory by its address would find none: PyTorch then raises.
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.scaled_data = data
        tensor.shown_dtype = dtype or data.dtype
        tensor.family = family or Family(data, scale, shifts)
        return tensor

    @property
    def scale(self) -> torch.Tensor:
        return self.family.scale

    @property
    def shifts(self) -> Shifts:
        return self.family.shifts

    def view_of_data(self, data: torch.Tensor) -> ScaledTensor:
        """A view of this tensor, where `data` is the same view of its data."""
        family = self.family
        return ScaledTensor(data, family.scale, family.shifts, family=family, dtype=self.shown_dtype)

    def with_data(self, data: torch.Tensor) -> ScaledTensor:
        """Other data at the same scale."""
        return ScaledTensor(data, self.family.scale, self.family.shifts, dtype=self.shown_dtype)

    @property
    def is_rounded(self) -> bool:
        """Whether the data are of the dtype that autograd sees."""
        return self.scaled_data.dtype == self.shown_dtype

    def to_true(self) -> torch.Tensor:
        """The value as a plain tensor, in float32 where the data are float16."""
        data = self.scaled_data
        return over(data.to(torch.promote_types(data.dtype, torch.float32)), self.family.scale)

    def assign(self, value: ScaledTensor) -> None:
        """Write a value in place. Where the tensor shares its data with others, theirs are rescaled with
        it."""
        family = self.family
        if self.scaled_data is family.root:
            self.scaled_data.copy_(value.scaled_data)
            family.scale = value.scale
            return
        fits = factor_to(FLOAT16.max, finite_peak(family.root)) * family.scale
        scale = torch.minimum(value.scale, fits)
        # Before the root changes, of which the value may be another view.
        data = times(value.scaled_data.float(), scale / value.scale)
        family.root.copy_(times(family.root.float(), scale / family.scale))
        family.scale = scale
        self.scaled_data.copy_(data)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ScaledTensor({self.to_true()}, scale={self.scale})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_true().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _NEEDS_MEMORY:
            return func(args[0].to_true(), *args[1:], **(kwargs or {}))
        if func is torch.Tensor.data_ptr:
            raise RuntimeError(
                "The memory of a scaled gradient cannot be read by its address: declare the autograd "
                "function that does so with ada_loss.torch.linear_backward, or let it read gradient.float()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if holds_others(types):
            return NotImplemented
        return cls.apply_operator(func, args, kwargs or {})

    apply_operator: ClassVar[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]]
    """What an operator returns for scaled tensors; put here by `ada_loss.torch.operators`, which needs this
    class."""


@cache
def holds_others(types: tuple[type, ...]) -> bool:
    """Whether tensors of one of these types hold others, as nested and distributed ones do: those take
    operators apart first, and the rules apply to what they hold."""
    return any(kind is not ScaledTensor and hasattr(kind, "__tensor_flatten__") for kind in types)


_NEEDS_MEMORY = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__deepcopy__}
"""What hands out or copies a tensor's memory: of the true value, in float32."""
