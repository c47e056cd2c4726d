"""float16 products on the CPU, computed in float32 and rounded once."""

import pytest
import torch
import torch.nn.functional as F

from ada_loss.torch import GradScaler, float32_kernels
from torch_.asserts import assert_close, gradients_of
from torch_.nets import NETS, loss_of, make

PRODUCTS = {
    "convolution": lambda x, w: F.conv2d(x, w, w[:, 0, 0, 0], padding=1),
    "strided": lambda x, w: F.conv2d(x, w, stride=2),
    "transposed": lambda x, w: F.conv_transpose2d(x, w),
    "matrix": lambda x, w: x.flatten(1) @ x.flatten(1).t(),
    "linear": lambda x, w: F.linear(x[:, 0, 0], w.flatten(1)[:, :8], w[:, 0, 0, 0]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_is_the_rounded_product_of_float32(product):
    x, w = torch.randn(2, 8, 8, 8).half(), torch.randn(8, 8, 3, 3).half()
    with float32_kernels():
        result = product(x, w)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, product(x.float(), w.float()).half(), rtol=0, atol=0)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_gradients_are_those_of_float16(product):
    x = torch.randn(2, 8, 8, 8).half().requires_grad_()
    w = torch.randn(8, 8, 3, 3).half().requires_grad_()
    with float32_kernels():
        product(x, w).float().square().mean().backward()
    ours, x.grad = x.grad, None
    product(x, w).float().square().mean().backward()
    assert ours.dtype == torch.float16
    assert_close({"x": ours}, {"x": x.grad}, db=45)


@pytest.mark.parametrize("name", NETS)
def test_a_step_with_the_scaler_within(name):
    net, x, target = make(name)
    net.zero_grad()
    GradScaler("cpu").scale(loss_of(net, x, target, -24)).backward()
    plain = gradients_of(net)
    net.zero_grad()
    with float32_kernels():
        GradScaler("cpu").scale(loss_of(net, x, target, -24)).backward()
    assert_close(gradients_of(net), plain, db=20)


def test_float32_is_left_alone():
    x = torch.randn(4, 4)
    with float32_kernels():
        assert torch.equal(x @ x, (x @ x).clone()) and (x @ x).dtype == torch.float32
