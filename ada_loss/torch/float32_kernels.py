"""float16 on a CPU at the speed of float32: products are computed in float32 and rounded once.

PyTorch's own kernels for float16 are many times slower on most processors. As on a GPU, what is multiplied is
float16, what is added up is float32, and the result is float16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ada_loss.torch.operators.arguments import mapped, widened
from ada_loss.torch.scaled_tensor import ScaledTensor, holds_others

aten = torch.ops.aten

_ROUNDED: dict[Any, int] = {
    aten.convolution.default: 1,
    aten.convolution_backward.default: 3,
    aten.mm.default: 1,
    aten.addmm.default: 1,
    aten.bmm.default: 1,
    aten.baddbmm.default: 1,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 1,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}
"""How many results of an operator, the first ones, are of its arguments' dtype."""


class float32_kernels(TorchDispatchMode):  # noqa: N801 (used as a function is)
    """Products of float16 tensors on the CPU are computed in float32 within, forward and backward.

        with ada_loss.torch.float32_kernels(), torch.autocast("cpu", torch.float16):
            loss = criterion(model(x), y)

    Backward passes under a `GradScaler` or `backward()` of this package do so anyway. Other dtypes and
    devices are left alone.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types and (ScaledTensor in types or holds_others(types)):
            return NotImplemented
        count = _ROUNDED.get(func)
        if count is None or args[0].dtype != torch.float16 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        results = func(*mapped(widened, args), **mapped(widened, kwargs))
        if isinstance(results, torch.Tensor):
            return results.half()
        return tuple(
            result.half() if i < count and result is not None else result for i, result in enumerate(results)
        )
