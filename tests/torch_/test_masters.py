"""float16 parameters: float32 gradients, and masters in the optimizer's step."""

import copy

import pytest
import torch
from torch import nn

import ada_loss.torch
from ada_loss.torch import GradScaler
from torch_.asserts import assert_close, assert_plain_float32, float32_gradients, gradients_of


def make(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3)).half()
    return net, torch.randn(16, 8).half(), torch.randn(16, 3)


def loss_of(net, x, target, exponent=0):
    return (net(x).float() - target).square().mean() * 2.0**exponent


def train(net, optimizer, scaler, x, target, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, x, target)).backward()
        scaler.step(optimizer)
        scaler.update()


def widened(net):
    return copy.deepcopy(net).float()


@pytest.mark.parametrize("exponent", [-30, 0])
def test_gradients_are_true_and_float32(exponent):
    net, x, target = make()
    wide = widened(net)
    plain = float32_gradients(wide, lambda: loss_of(wide, x.float(), target, exponent).backward())
    with ada_loss.torch.backward():
        loss_of(net, x, target, exponent).backward()
    assert_plain_float32(net)
    assert_close(gradients_of(net), plain, db=40)


def test_a_float16_loss_is_scaled_as_well():
    net, x, _ = make()
    wide = widened(net)
    plain = float32_gradients(wide, lambda: (wide(x.float()).square().mean() * 2**-13).backward())
    with ada_loss.torch.backward():
        (net(x).square().mean() * 2**-13).backward()
    assert_close(gradients_of(net), plain, db=40)


def test_gradients_of_several_passes_add_up():
    net, x, target = make()
    for _ in range(3):
        with ada_loss.torch.backward():
            loss_of(net, x, target, -30).backward()
    wide = widened(net)
    plain = float32_gradients(wide, lambda: (3 * loss_of(wide, x.float(), target, -30)).backward())
    assert_plain_float32(net)
    assert_close(gradients_of(net), plain, db=40)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_small_updates_are_not_lost(make_optimizer):
    net, x, target = make()
    wide = widened(net)
    optimizer, scaler = make_optimizer(net.parameters(), lr=1e-5), GradScaler("cpu")
    other = make_optimizer(wide.parameters(), lr=1e-5)
    train(net, optimizer, scaler, x, target, 20)
    for _ in range(20):
        other.zero_grad()
        loss_of(wide, x.float(), target).backward()
        other.step()
    start = dict(make()[0].named_parameters())
    masters = scaler.state_dict()["ada_loss"]["masters"][0]
    ours = {name: masters[place]["master"] - start[name].detach() for place, name in enumerate(start)}
    assert_close(
        ours, {name: p.detach() - start[name].detach() for name, p in wide.named_parameters()}, db=15
    )


def test_parameters_stay_float16_and_are_the_rounded_masters():
    net, x, target = make()
    optimizer, scaler = torch.optim.AdamW(net.parameters(), lr=1e-3), GradScaler("cpu")
    parameters = list(net.parameters())
    train(net, optimizer, scaler, x, target, 2)
    masters = scaler.state_dict()["ada_loss"]["masters"][0]
    for place, parameter in enumerate(net.parameters()):
        assert parameter is parameters[place] and parameter.dtype == torch.float16
        assert torch.equal(parameter, masters[place]["master"].half())
        assert parameter in optimizer.state


def test_a_parameter_that_was_changed_is_followed():
    net, x, target = make()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1e-6), GradScaler("cpu")
    train(net, optimizer, scaler, x, target, 2)
    with torch.no_grad():
        net[0].weight.fill_(0.25)
    train(net, optimizer, scaler, x, target, 1)
    assert (net[0].weight - 0.25).abs().max() < 1e-3


def test_a_training_goes_on_from_its_checkpoint():
    net, x, target = make()
    optimizer, scaler = torch.optim.AdamW(net.parameters(), lr=1e-4), GradScaler("cpu")
    train(net, optimizer, scaler, x, target, 3)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), scaler.state_dict()])
    train(net, optimizer, scaler, x, target, 3)

    other, _, _ = make(1)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-4), GradScaler("cpu")
    for part, state in zip((other, *resumed), saved, strict=True):
        part.load_state_dict(state)
    train(other, *resumed, x, target, 3)

    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_without_the_scalers_state_is_refused():
    net, x, target = make()
    optimizer, scaler = torch.optim.AdamW(net.parameters(), lr=1e-4), GradScaler("cpu")
    train(net, optimizer, scaler, x, target, 1)
    resumed = torch.optim.AdamW(net.parameters(), lr=1e-4)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="load the GradScaler's state_dict"):
        train(net, resumed, GradScaler("cpu"), x, target, 1)


def test_overflow_leaves_float16_parameters_alone():
    net, x, target = make()
    optimizer, scaler = torch.optim.AdamW(net.parameters(), lr=1e-4), GradScaler("cpu")
    before = [parameter.detach().clone() for parameter in net.parameters()]
    scaler.scale(loss_of(net, x, target) * torch.tensor(3e38) * 10).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert scaler.skipped == 1


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "Adagrad", "Adadelta", "RMSprop", "NAdam", "Adamax", "Rprop"]
)
def test_optimizers_of_pytorch_update_masters(name):
    net, x, target = make()
    optimizer, scaler = getattr(torch.optim, name)(net.parameters(), lr=1e-2), GradScaler("cpu")
    before = net[0].weight.detach().clone()
    train(net, optimizer, scaler, x, target, 2)
    assert net[0].weight.dtype == torch.float16 and not torch.equal(before, net[0].weight)
    states = [state for state in optimizer.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(value.dtype == torch.float32 for value in tensors if value.dim())


def test_gradients_can_be_clipped():
    net, x, target = make()
    with ada_loss.torch.backward():
        loss_of(net, x, target).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    norm = torch.stack([parameter.grad.norm() for parameter in net.parameters()]).norm()
    assert abs(norm - 0.01) < 1e-4


def test_adapters_in_float32_on_a_float16_base():
    net, x, target = make()
    net.requires_grad_(False)
    down, up = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)

    def loss(base, dtype, exponent):
        out = base(x.to(dtype)) + up(down(x.float())).to(dtype)
        return (out.float() - target).square().mean() * 2.0**exponent

    adapters = nn.ModuleList([down, up])
    plain = float32_gradients(adapters, lambda: loss(widened(net), torch.float32, -30).backward())
    with ada_loss.torch.backward():
        loss(net, torch.float16, -30).backward()
    assert_close(gradients_of(adapters), plain, db=40)
