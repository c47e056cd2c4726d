"""Adaptive loss scaling for PyTorch: `GradScaler` in place of `torch.amp.GradScaler`, or `backward()` around
a backward pass."""

from ada_loss.torch import requirement as requirement  # isort: skip  (says what is missing)

from ada_loss.core.config import AdaLossConfig
from ada_loss.torch.backward_mode import backward
from ada_loss.torch.compiled import backend
from ada_loss.torch.float32_kernels import float32_kernels
from ada_loss.torch.grad_scaler import GradScaler
from ada_loss.torch.recording import record
from ada_loss.torch.scaled_tensor import ScaledTensor
from ada_loss.torch.user_functions import linear_backward

__all__ = [
    "AdaLossConfig",
    "GradScaler",
    "ScaledTensor",
    "backend",
    "backward",
    "float32_kernels",
    "linear_backward",
    "record",
]
