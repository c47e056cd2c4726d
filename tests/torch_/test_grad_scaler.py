"""`GradScaler` in the place of PyTorch's."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from ada_loss.torch import AdaLossConfig, GradScaler
from torch_.asserts import assert_close, float32_gradients, gradients_of
from torch_.nets import loss_of, make


@pytest.fixture
def training():
    """A network, a function that returns its loss, and its optimizer."""
    net, x, target = make("transformer")
    return net, lambda exponent=0: loss_of(net, x, target, exponent), torch.optim.SGD(net.parameters(), 0.1)


def weights_of(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def overflowing(loss):
    """The loss, with an infinite gradient."""
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def test_passes_for_pytorchs_scaler():
    assert isinstance(GradScaler(), torch.amp.GradScaler)
    assert GradScaler().is_enabled() and GradScaler("cuda", 2.0**10, 2.0, 0.5, 100, True).is_enabled()


def test_a_loop_trains(training):
    net, loss, optimizer = training
    scaler = GradScaler("cpu")
    first = loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert loss().item() < first and scaler.skipped == 0 and scaler.get_scale() == 1.0


def test_scaled_loss_has_the_losss_value(training):
    _, loss, _ = training
    assert GradScaler().scale(loss()).item() == loss().item()


def test_several_losses_are_scaled_at_once(training):
    _, loss, _ = training
    scaler = GradScaler()
    first, second = scaler.scale([loss(), loss()])
    (first + second).backward()


def test_what_is_computed_from_a_scaled_loss_scales_as_well(training):
    net, loss, _ = training
    scaler = GradScaler()
    (scaler.scale(loss(-30)) / 4).backward()
    quarter = gradients_of(net)
    net.zero_grad()
    scaler.scale(loss(-32)).backward()
    assert_close(quarter, gradients_of(net), db=60)


def test_disabled_does_nothing(training):
    net, loss, optimizer = training
    scaler = GradScaler("cpu", enabled=False)
    unscaled = loss()
    assert scaler.scale(unscaled) is unscaled and not scaler.is_enabled() and scaler.state_dict() == {}
    unscaled.backward()
    before = weights_of(net)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not same(before, weights_of(net)) and scaler.get_scale() == 1.0 and scaler.skipped == 0


def test_overflow_skips_the_step_and_is_counted(training, caplog):
    net, loss, optimizer = training
    scaler, before = GradScaler("cpu"), weights_of(net)
    with caplog.at_level(logging.WARNING):
        scaler.scale(overflowing(loss())).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same(before, weights_of(net)) and scaler.skipped == 1
    assert "A step was skipped: the loss was finite, but" in caplog.text


def test_a_step_after_overflow_is_taken(training):
    net, loss, optimizer = training
    scaler, before = GradScaler("cpu"), weights_of(net)
    for each in (overflowing(loss()), loss()):
        optimizer.zero_grad()
        scaler.scale(each).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not same(before, weights_of(net)) and scaler.skipped == 1


def test_gradients_are_true_after_overflow(training):
    net, loss, optimizer = training
    scaler = GradScaler("cpu")
    scaler.scale(overflowing(loss())).backward()
    scaler.step(optimizer)
    scaler.update()
    plain = float32_gradients(net, lambda: loss().backward())
    scaler.scale(loss()).backward()
    assert_close(gradients_of(net), plain, db=40)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said_at_once(training, caplog, value):
    _, loss, optimizer = training
    scaler = GradScaler("cpu")
    with caplog.at_level(logging.WARNING):
        scaled = scaler.scale(loss() * value)
    assert "The loss itself is not finite" in caplog.text
    scaled.backward()
    with caplog.at_level(logging.WARNING):
        scaler.step(optimizer)
    assert "the loss itself was not finite" in caplog.text


def test_state_goes_on_where_it_was_saved(training):
    net, loss, optimizer = training
    scaler = GradScaler("cpu")
    scaler.scale(overflowing(loss())).backward()
    scaler.step(optimizer)
    scaler.update()
    other = GradScaler("cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.skipped == 1 and other.state_dict() == scaler.state_dict()


def test_takes_a_state_of_pytorchs_scaler(training):
    _, loss, _ = training
    scaler = GradScaler("cpu")
    scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    scaler.scale(loss())
    assert scaler.get_scale() == 1.0


def test_a_loss_is_scaled_once(training):
    _, loss, _ = training
    scaler = GradScaler("cpu")
    with pytest.raises(ValueError, match="scaled already"):
        scaler.scale(scaler.scale(loss()))


def test_a_step_needs_a_loss_that_the_scaler_knows(training):
    _, loss, optimizer = training
    loss().backward()
    with pytest.raises(RuntimeError, match="no loss was differentiated"):
        GradScaler("cpu").step(optimizer)


def test_a_scaled_loss_is_not_differentiated_without_scaling(training):
    _, loss, _ = training
    with pytest.raises(RuntimeError, match="call the loss's own backward"):
        GradScaler("cpu").scale(loss()).as_subclass(torch.Tensor).backward()


def test_the_function_scales_or_refuses(training):
    """Not every version of PyTorch lets it be overridden."""
    net, loss, _ = training
    plain = float32_gradients(net, lambda: loss().backward())
    scaled = GradScaler("cpu").scale(loss())
    try:
        torch.autograd.backward(scaled)
    except RuntimeError as error:
        assert "call the loss's own backward" in str(error)
    else:
        assert_close(gradients_of(net), plain, db=40)


def test_a_model_without_float16_is_said_once(training):
    net, _, optimizer = training
    _, x, target = make("transformer")
    scaler = GradScaler("cpu")
    with pytest.warns(UserWarning, match="No gradient of this model is in float16") as warned:
        for _ in range(2):
            scaler.scale(loss_of(net, x, target, float16=False)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert len(warned) == 1


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"not on '{device}'"):
        GradScaler(device)


@pytest.mark.parametrize(
    "setting", [{"loss_scale_method": "element_wise_range"}, {"update_per_n_iteration": 2}]
)
def test_settings_without_a_meaning_here_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GradScaler("cpu", config=AdaLossConfig(**setting))


@pytest.mark.parametrize("method", ["auto", "approx_range", "abs_range", "fixed"])
def test_methods_train(training, method):
    net, loss, optimizer = training
    plain = float32_gradients(net, lambda: loss().backward())
    scaler = GradScaler("cpu", config=AdaLossConfig(loss_scale_method=method))
    scaler.scale(loss()).backward()
    assert_close(gradients_of(net), plain, db=25)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])
def test_copies_go_on_where_the_scaler_was(training, copied):
    net, loss, _ = training
    net.half()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = GradScaler("cpu")
    for each in (lambda: overflowing(loss()), loss):
        optimizer.zero_grad()
        scaler.scale(each()).backward()
        scaler.step(optimizer)
        scaler.update()
    other = copied(scaler)
    assert other.skipped == 1
    torch.testing.assert_close(other.state_dict(), scaler.state_dict())


def test_a_float16_loss():
    net, x = nn.Linear(8, 4).half(), torch.randn(16, 8).half()
    wide = copy.deepcopy(net).float()
    plain = float32_gradients(wide, lambda: (wide(x.float()).square().mean() * 2.0**-12).backward())
    GradScaler("cpu").scale(net(x).square().mean() * 2.0**-12).backward()
    assert_close(gradients_of(net), plain, db=40)


def test_a_gradient_for_a_loss_with_axes():
    net, x = nn.Linear(8, 4).half(), torch.randn(16, 8).half()
    wide = copy.deepcopy(net).float()
    gradient = torch.randn(16, 4).half() * 2.0**-12
    plain = float32_gradients(wide, lambda: wide(x.float()).backward(gradient.float()))
    GradScaler("cpu").scale(net(x)).backward(gradient)
    assert_close(gradients_of(net), plain, db=40)
