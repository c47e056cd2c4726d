"""Code of users that runs within backward sees true gradients, and what it returns counts."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ada_loss.torch
from ada_loss.torch import ScaledTensor, linear_backward
from torch_.asserts import assert_close, assert_plain_float32, gradients_of, signal_to_noise
from torch_.nets import loss_of, make

SMALL = -24


class Net(nn.Module):
    """Two layers, between which a test may put something."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.between = between or (lambda h: h)

    def forward(self, x):
        return self.second(torch.tanh(self.between(self.first(x))))


def differentiate(net, x, *, scaled, prepare=lambda net: None, exponent=SMALL):
    """Gradients of a small loss: ours in float16 by autocast, or PyTorch's own in float32."""
    net = copy.deepcopy(net)
    prepare(net)
    with torch.autocast("cpu", torch.float16, enabled=scaled):
        loss = net(x).float().square().mean() * 2.0**exponent
    if scaled:
        with ada_loss.torch.backward():
            loss.backward()
    else:
        loss.backward()
    return net


def assert_as_in_float32(net, prepare=lambda net: None, *, db=35):
    """Gradients are those of float32, with the same code of the user in both."""
    x = torch.randn(32, 8)
    ours = differentiate(net, x, scaled=True, prepare=prepare)
    assert_plain_float32(ours)
    plain = differentiate(net, x, scaled=False, prepare=prepare)
    assert_close(gradients_of(ours), gradients_of(plain), db=db)


def with_hook(hook):
    """A tensor hook between the layers."""

    def between(h):
        h.register_hook(hook)
        return h

    return Net(between)


CHANGES = {
    "clipped by value": lambda g: g.clamp(-1e-9, 1e-9),
    "clipped by norm": lambda g: g * (1e-9 / g.norm()).clamp(max=1.0),
    "normalized": lambda g: F.normalize(g.float(), dim=-1).to(g.dtype),
    "signs": torch.sign,
    "masked": lambda g: torch.where(g.abs() > g.abs().mean(), g, torch.zeros_like(g)),
    "added": lambda g: g + 1e-9,
    "replaced": lambda g: torch.full_like(g, 1e-9),
    "in true float32": lambda g: (g.float() * 3).to(g.dtype),
    "by item": lambda g: g * (1e-9 / max(g.abs().max().item(), 1e-9)),
    "in place": lambda g: g.clone().mul_(0.5),
    "a view in place": lambda g: (c := g.clone(), c[:, 3].mul_(100), c[2:4].zero_())[0],
    "sorted": lambda g: g.sort(-1).values,
    "through numpy": lambda g: torch.from_numpy(np.clip(g.numpy(), -1e-9, 1e-9)).to(g.dtype),
}


@pytest.mark.filterwarnings("ignore:ada_loss has no rule")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hooks_on_tensors_change_true_gradients(change):
    assert_as_in_float32(with_hook(change))


def test_hooks_that_change_a_gradient_in_place():
    def hook(gradient):
        gradient[:, 0].zero_()
        gradient.mul_(0.25)

    assert_as_in_float32(with_hook(hook))


def test_hooks_see_true_gradients():
    seen = []
    x = torch.randn(32, 8)
    net = with_hook(lambda g: seen.append(g.float()))
    for scaled in (True, False):
        differentiate(net, x, scaled=scaled)
    assert signal_to_noise(*seen) > 40


def test_hooks_on_modules():
    def prepare(net):
        net.second.register_full_backward_hook(lambda m, gi, go: (gi[0].clamp(-1e-9, 1e-9),))
        net.second.register_full_backward_pre_hook(lambda m, go: (go[0] * 3,))

    assert_as_in_float32(Net(), prepare)


def test_hooks_on_parameters():
    def double(parameter):
        parameter.grad.mul_(2)

    def prepare(net):
        for parameter in net.parameters():
            parameter.register_hook(lambda g: g.clamp(-1e-9, 1e-9))
            parameter.register_post_accumulate_grad_hook(double)

    assert_as_in_float32(Net(), prepare)


def test_hooks_on_nodes_of_the_graph():
    def between(h):
        h.grad_fn.register_prehook(lambda gradients: (gradients[0].clamp(-1e-9, 1e-9),))
        return h * 2

    assert_as_in_float32(Net(between))


class Squashing(torch.autograd.Function):
    """Its backward pass is not linear in the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.atan(gradient * 1e9) * 1e-9


class Recomputing(torch.autograd.Function):
    """Computes forward again, and differentiates that within backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x).exp()

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(torch.tanh(x).exp(), gradient)
        return x.grad.to(gradient.dtype)


class InForward(torch.autograd.Function):
    """Computes its gradient in forward, and multiplies it by that of the loss, as fused losses do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x / x.numel())
        return x.float().square().mean()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient


class Buffered(torch.autograd.Function):
    """Adds its gradient up in a buffer of its own."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        buffer = torch.zeros(gradient.shape, dtype=gradient.dtype)
        for row in range(len(gradient)):
            buffer[row].add_(gradient[row], alpha=2)
        return buffer


@pytest.mark.filterwarnings("ignore:ada_loss has no rule")
@pytest.mark.parametrize("function", [Squashing, Recomputing, Buffered])
def test_functions_of_users(function):
    assert_as_in_float32(Net(function.apply))


def test_a_loss_that_computes_its_gradient_in_forward():
    x = torch.randn(32, 8)
    net = nn.Linear(8, 16)
    nets = []
    for scaled in (True, False):
        nets.append(copy.deepcopy(net))
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = InForward.apply(nets[-1](x)) * 2.0**SMALL
        with ada_loss.torch.backward():
            loss.backward()
    assert_close(gradients_of(nets[0]), gradients_of(nets[1]), db=35)


def scaled(values, scale=2.0**20):
    with ada_loss.torch.backward() as mode:
        pass
    data = (torch.as_tensor(values) * scale).half()
    return ScaledTensor(data, torch.tensor(scale, dtype=torch.float64), mode.shifts)


def test_a_scaled_tensor_shows_its_true_value():
    tensor = scaled([2.0**-20, 3 * 2.0**-20])
    assert tensor.tolist() == [2.0**-20, 3 * 2.0**-20] and tensor[1].item() == 3 * 2.0**-20
    assert tensor.numpy().tolist() == tensor.tolist() and np.asarray(tensor).tolist() == tensor.tolist()
    assert bool((tensor < 1e-5).all()) and "scale=1048576" in repr(tensor)
    assert tensor.dtype == torch.float16 and tensor.float().tolist() == tensor.tolist()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_hold_the_true_value(copied):
    assert copied(scaled([2.0**-20])).tolist() == [2.0**-20]


def test_reading_its_memory_by_address_is_refused():
    with pytest.raises(RuntimeError, match="declare the autograd function .*linear_backward"):
        scaled([1.0]).data_ptr()


@linear_backward
class ByAddress(torch.autograd.Function):
    """Reads memory, as a kernel of one's own does; of two gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight, x + 1

    @staticmethod
    def backward(ctx, product, total):
        x, weight = ctx.saved_tensors
        assert product.data_ptr() and total.data_ptr() and type(product) is torch.Tensor
        return product * weight + total, (product * x).float().sum(0)


def test_a_function_that_reads_memory_is_declared_linear():
    weight = torch.rand(16)
    assert_as_in_float32(Net(lambda h: sum_of(ByAddress.apply(h, weight))))


def sum_of(both):
    """The two arrive with gradients of very different sizes."""
    return both[0] + both[1] * 2.0**-6


def test_gradients_of_a_function_that_is_declared_linear():
    grads = []
    for scaled in (True, False):
        x = torch.arange(32.0).reshape(2, 16).div(8).to(torch.float16 if scaled else torch.float32)
        weight = torch.ones(16, requires_grad=True)
        loss = sum_of(ByAddress.apply(x.requires_grad_(), weight)).float().square().mean() * 2.0**SMALL
        with ada_loss.torch.backward():
            loss.backward()
        grads.append({"x": x.grad, "weight": weight.grad})
    assert_close(*grads, db=40)


def test_an_operator_without_a_rule_is_said_once():
    ada_loss.torch.operators.fallback.forget_warnings()
    with pytest.warns(UserWarning, match="no rule for aten.atan") as warned:
        torch.atan(scaled([1.0])), torch.atan(scaled([1.0]))
    assert len(warned) == 1


def test_its_bits_are_those_of_the_true_value():
    values = torch.tensor([1.5 * 2.0**-10, -(2.0**-20)])
    assert torch.equal(scaled(values).view(torch.int16), values.half().view(torch.int16))


def test_results_written_to_a_tensor_that_is_given():
    out, plain = scaled([0.0, 0.0]), torch.zeros(2)
    torch.add(scaled([2.0**-20, 2.0**-8]), scaled([2.0**-20, 2.0], 2.0**10), out=out)
    torch.mul(scaled([2.0**-30, 2.0**-8], 2.0**16), 2, out=plain)
    assert out.tolist() == [2.0**-19, 2 + 2.0**-8] and plain.tolist() == [2.0**-29, 2.0**-7]


def test_a_view_and_its_base_change_together():
    base = scaled([2.0**-20, 2.0**-20])
    base[0].fill_(1000.0)
    view = base[1:]
    base[1].mul_(2)
    assert base.tolist() == [1000.0, 2.0**-19] and view.tolist() == [2.0**-19]


def test_retained_gradients_of_intermediate_values_are_true():
    net, x, target = make("residual")
    grads = []
    for float16 in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=float16):
            h = net[0](x)
            h.retain_grad()
            loss = loss_of(nn.Sequential(*list(net)[1:]), h, target, SMALL, float16=float16)
        with ada_loss.torch.backward():
            loss.backward()
        grads.append(h.grad.float())
    assert signal_to_noise(*grads) > 20
