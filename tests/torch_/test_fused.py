"""Rules of kernels that only GPUs have, with operators of the CPU in their places."""

import pytest
import torch

from ada_loss.torch import AdaLossConfig, ScaledTensor
from ada_loss.torch.operators import fallback
from ada_loss.torch.operators.fused import attention, normalization, recurrent
from ada_loss.torch.shifts import shifts_for
from torch_.asserts import signal_to_noise

aten = torch.ops.aten
SHIFTS = shifts_for(AdaLossConfig())


def scaled(true, exponent=20):
    """A true gradient at a scale."""
    scale = torch.tensor(2.0**exponent, dtype=torch.float64)
    return ScaledTensor((true * scale).half(), scale, SHIFTS)


def attended(q, k, v):
    q, k, v = (t.float() for t in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


@pytest.mark.parametrize("exponent", [6, 20, 34])
@pytest.mark.parametrize("length", [8, 256])
def test_attention(exponent, length):
    q, k, v = torch.randn(3, 2, 4, length, 32).half()
    out, log_sums = attended(q, k, v)
    gradient = torch.randn_like(out) * 2.0**-exponent
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    wide = kernel(gradient, q.float(), k.float(), v.float(), out, log_sums, 0.0, False)
    ours = attention(kernel, (scaled(gradient, exponent), q, k, v, out.half(), log_sums, 0.0, False), {})
    for actual, expected in zip(ours, wide, strict=True):
        assert isinstance(actual, ScaledTensor) and actual.dtype == torch.float16
        assert signal_to_noise(actual.float(), expected) > 40


def sums_of_gradients(*args):
    """As a recurrent layer: linear in the gradients at 7, 8 and 9."""
    output, hidden = args[7], args[8]
    return output @ output.new_ones(8, 8) + hidden, [hidden * 3], args[9]


def test_recurrent_layers_bring_their_gradients_to_one_scale():
    output, hidden = torch.randn(4, 8) * 2.0**-20, torch.randn(4, 8) * 2.0**-24
    args = (None,) * 7 + (scaled(output, 24), scaled(hidden, 30), None)
    first, (second,), third = recurrent(7, 8, 9)(sums_of_gradients, args, {})
    assert signal_to_noise(first.float(), output @ torch.ones(8, 8) + hidden) > 40
    assert signal_to_noise(second.float(), hidden * 3) > 40 and third is None
    assert first.scale == second.scale


def as_cudnn(x, gradient, weight, running_mean, running_var, mean, deviation, eps, reserve):
    half = aten.native_batch_norm_backward(
        gradient.float(), x.float(), weight, running_mean, running_var, mean, deviation, True, eps, [True] * 3
    )
    return half[0].half(), half[1], half[2]


@pytest.mark.parametrize("weight", [1.0, 2.0**10, 2.0**-10])
def test_batch_normalization(weight):
    x, gradient = torch.randn(8, 4, 5, 5).half(), torch.randn(8, 4, 5, 5) * 2.0**-20
    weights = torch.rand(4) * weight
    _, mean, deviation = aten.native_batch_norm(x.float(), weights, weights, None, None, True, 0.1, 1e-5)
    args = (weights, None, None, mean, deviation, 1e-5, None)
    wide = aten.native_batch_norm_backward(gradient, x.float(), *args[:5], True, 1e-5, [True] * 3)
    ours = normalization(as_cudnn, (x, scaled(gradient), *args), {})
    assert isinstance(ours[0], ScaledTensor) and type(ours[1]) is type(ours[2]) is torch.Tensor
    for actual, expected in zip(ours, wide, strict=True):
        assert signal_to_noise(actual.float(), expected) > 40


def test_what_only_a_kernel_can_read_is_not_given_to_another():
    gradient = scaled(torch.randn(4, 4))
    plain = torch.randn(4, 4).half()
    args = (plain, gradient, plain, None, None, None, None, 1e-5, plain)
    with pytest.raises(RuntimeError, match="cannot compute it in float32"):
        fallback.from_true_values(aten.cudnn_batch_norm_backward.default, args, {})
