"""What autograd offers besides one backward pass."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ada_loss.torch
from ada_loss.torch import GradScaler
from torch_.asserts import (
    assert_close,
    assert_plain_float32,
    assert_same_bits,
    float32_gradients,
    gradients_of,
    signal_to_noise,
)
from torch_.nets import cross_entropy, loss_of, make

SMALL = -24


@pytest.fixture
def net():
    return make("transformer")


def plain_gradients(net, x, target, exponent=SMALL, times=1):
    return float32_gradients(
        net, lambda: (loss_of(net, x, target, exponent, float16=False) * times).backward()
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(net, use_reentrant):
    net, x, target = net
    plain = plain_gradients(net, x, target)

    def forward(tokens):
        h = net.embedding(tokens)
        for layer in net.layers:
            h = checkpoint(layer, h, use_reentrant=use_reentrant)
        return net.out(h)

    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy(forward(x), target) * 2.0**SMALL
    GradScaler("cpu").scale(loss).backward()
    assert_plain_float32(net)
    assert_close(gradients_of(net), plain, db=35)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_float16_modules(use_reentrant):
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).half()
    x = torch.randn(4, 8).half().requires_grad_()
    wide = copy.deepcopy(net).float()
    plain = float32_gradients(wide, lambda: (wide(x.float()).square().mean() * 2.0**SMALL).backward())
    loss = checkpoint(net, x, use_reentrant=use_reentrant).float().square().mean() * 2.0**SMALL
    GradScaler("cpu").scale(loss).backward()
    assert_plain_float32(net)
    assert_close(gradients_of(net), plain, db=40)


def test_gradients_accumulate(net):
    net, x, target = net
    plain = plain_gradients(net, x, target, times=3)
    scaler = GradScaler("cpu")
    for _ in range(3):
        scaler.scale(loss_of(net, x, target, SMALL)).backward()
    assert_close(gradients_of(net), plain, db=35)


def test_a_graph_is_differentiated_again(net):
    net, x, target = net
    plain = plain_gradients(net, x, target, times=2)
    loss = GradScaler("cpu").scale(loss_of(net, x, target, SMALL))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(gradients_of(net), plain, db=35)


def test_some_leaves_only(net):
    net, x, target = net
    plain = plain_gradients(net, x, target)
    GradScaler("cpu").scale(loss_of(net, x, target, SMALL)).backward(inputs=[net.out.weight])
    assert net.embedding.weight.grad is None
    assert signal_to_noise(net.out.weight.grad, plain["out.weight"]) > 35


@pytest.mark.parametrize("way", ["scaler", "context"])
def test_autograd_grad_returns_true_plain_gradients(net, way):
    net, x, target = net
    plain = plain_gradients(net, x, target)
    loss = loss_of(net, x, target, SMALL)
    names, parameters = zip(*net.named_parameters(), strict=True)
    if way == "scaler":
        gradients = torch.autograd.grad(GradScaler("cpu").scale(loss), parameters)
    else:
        with ada_loss.torch.backward():
            gradients = torch.autograd.grad(loss, parameters)
    assert all(type(gradient) is torch.Tensor for gradient in gradients)
    assert_close(dict(zip(names, gradients, strict=True)), plain, db=35)


def test_autograd_grad_of_float16_values():
    x, w = torch.randn(4, 8).half().requires_grad_(), torch.randn(8, 8).half()
    with ada_loss.torch.backward():
        (gradient,) = torch.autograd.grad(x @ w, x, torch.full((4, 8), 2.0**-20).half())
    wide = x.detach().float().requires_grad_()
    (plain,) = torch.autograd.grad(wide @ w.float(), wide, torch.full((4, 8), 2.0**-20))
    assert type(gradient) is torch.Tensor and gradient.dtype == torch.float32
    assert signal_to_noise(gradient, plain) > 40


def test_several_losses(net):
    net, x, target = net
    plain = plain_gradients(net, x, target, times=3)
    with ada_loss.torch.backward():
        torch.autograd.backward([loss_of(net, x, target, SMALL), 2 * loss_of(net, x, target, SMALL)])
    assert_close(gradients_of(net), plain, db=35)


def penalty_of(critic, x, dtype):
    """The gradient penalty of WGAN-GP."""
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        score = critic(x).float().sum()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return (gradient.float().norm(dim=1) - 1).square().mean() * 2.0**SMALL


def test_differentiating_twice():
    critic, x = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), torch.randn(16, 8)
    plain = float32_gradients(critic, lambda: penalty_of(critic, x, torch.float32).backward())
    GradScaler("cpu").scale(penalty_of(critic, x, torch.float16)).backward()
    ours = {name: gradient for name, gradient in gradients_of(critic).items() if gradient is not None}
    assert_close(ours, {name: plain[name] for name in ours}, db=30)


def test_differentiating_twice_both_times_with_scales():
    critic, x = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), torch.randn(16, 8)

    def penalty(scaler, float16):
        with torch.autocast("cpu", torch.float16, enabled=float16):
            loss = critic(x).float().square().mean() * 2.0**SMALL
        scaled = scaler.scale(loss) if scaler else loss
        gradients = torch.autograd.grad(scaled, list(critic.parameters()), create_graph=True)
        return sum((gradient * 2.0**-SMALL).square().sum() for gradient in gradients) * 2.0**SMALL

    plain = float32_gradients(critic, lambda: penalty(None, False).backward())
    scaler = GradScaler("cpu")
    scaler.scale(penalty(scaler, True)).backward()
    assert_close(gradients_of(critic), plain, db=30)


def sparse_gradient(table, dtype, *, autocast):
    embedding, linear = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 4, bias=False)
    embedding.weight.data, linear.weight.data = table.to(dtype), torch.ones(4, 8) / 8
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        out = linear(embedding(torch.tensor([1, 3, 3, 7])))
        loss = out.float().square().mean() * 2.0**SMALL
    with ada_loss.torch.backward():
        loss.backward()
    assert embedding.weight.grad.is_sparse
    return embedding.weight.grad.to_dense()


def test_sparse_embeddings():
    table = torch.randn(20, 8)
    plain = sparse_gradient(table, torch.float32, autocast=False)
    assert signal_to_noise(sparse_gradient(table, torch.float32, autocast=True), plain) > 35


@pytest.mark.filterwarnings("ignore:ada_loss has no rule for aten._sparse")
def test_sparse_embeddings_in_float16_are_refused():
    with pytest.raises(RuntimeError, match="A sparse gradient in float16 cannot be scaled"):
        sparse_gradient(torch.randn(20, 8), torch.float16, autocast=True)


def test_complex_numbers():
    grads = []
    weight = torch.randn(8, 16)
    for float16 in (True, False):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=float16):
            spectrum = torch.fft.rfft((torch.ones(4, 8) @ leaf).float())
            loss = (spectrum * (1 + 2j)).abs().mean() * 2.0**SMALL
        with ada_loss.torch.backward():
            loss.backward()
        grads.append(leaf.grad)
    assert signal_to_noise(*grads) > 35


def test_half_complex_numbers_are_refused():
    leaf = torch.randn(4, 8).half().requires_grad_()
    loss = torch.view_as_complex(leaf.reshape(4, 4, 2)).to(torch.complex64).abs().mean()
    with pytest.raises(RuntimeError, match="complex32 cannot be scaled"), ada_loss.torch.backward():
        loss.backward()


def test_nested_tensors():
    grads = []
    weight = torch.randn(8, 8)
    rows = [torch.randn(3, 8), torch.randn(5, 8)]
    for float16 in (True, False):
        linear = nn.Linear(8, 8, bias=False)
        linear.weight.data = weight.clone()
        nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
        with torch.autocast("cpu", torch.float16, enabled=float16):
            out = linear(nested)
            loss = out.values().float().square().mean() * 2.0**SMALL
        with ada_loss.torch.backward():
            loss.backward()
        grads.append(linear.weight.grad)
    assert signal_to_noise(*grads) > 35


def test_a_gan_with_one_scaler():
    generator, critic = nn.Linear(4, 8), nn.Linear(8, 1)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (generator, critic)]
    noise, real = torch.randn(16, 4), torch.randn(16, 8)
    scaler = GradScaler("cpu")
    for _ in range(3):
        generator.zero_grad()
        with torch.autocast("cpu", torch.float16):
            fake = generator(noise)
            critic_loss = critic(fake.detach()).float().mean() - critic(real).float().mean()
        optimizers[1].zero_grad()
        scaler.scale(critic_loss * 2.0**SMALL).backward()
        assert all(p.grad is None or not p.grad.any() for p in generator.parameters())
        scaler.step(optimizers[1])
        with torch.autocast("cpu", torch.float16):
            loss = -critic(fake).float().mean()
        optimizers[0].zero_grad()
        scaler.scale(loss * 2.0**SMALL).backward()
        scaler.step(optimizers[0])
        scaler.update()
        expected = -critic.weight.detach()[0] * 2.0**SMALL
        assert signal_to_noise(generator.bias.grad, expected) > 35


def test_threads_do_not_disturb_each_other(net):
    net, x, target = net

    def work(net, scaled):
        for _ in range(3):
            loss = loss_of(net, x, target, SMALL if scaled else 0)
            (GradScaler("cpu").scale(loss) if scaled else loss).backward()

    nets = [copy.deepcopy(net) for _ in range(6)]
    threads = [threading.Thread(target=work, args=(nets[i], i % 2 == 0)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone in (4, 5):
        work(nets[alone], alone % 2 == 0)
    for i in range(4):
        assert_same_bits(gradients_of(nets[i]), gradients_of(nets[4 + i % 2]))


@pytest.mark.filterwarnings("ignore:ada_loss has no rule for")
def test_a_whole_step_within_the_context(net):
    net, x, target = net
    plain = plain_gradients(net, x, target)
    with ada_loss.torch.backward():
        loss_of(net, x, target, SMALL).backward()
        with torch.no_grad():
            evaluated = loss_of(net, x, target)
        assert abs(evaluated.item() - loss_of(net, x, target, float16=False).item()) < 1e-2
    assert_close(gradients_of(net), plain, db=35)


def test_backward_of_a_float16_tensor_by_the_function():
    net, x = nn.Linear(8, 4).half(), torch.randn(16, 8).half()
    wide = copy.deepcopy(net).float()
    plain = float32_gradients(wide, lambda: (wide(x.float()).square().mean() * 2.0**-12).backward())
    with ada_loss.torch.backward():
        torch.autograd.backward(net(x).square().mean() * 2.0**-12)
    assert_close(gradients_of(net), plain, db=40)


def test_float16_gradients_by_the_function_are_scaled_or_refused():
    """Not every version of PyTorch lets it be overridden."""
    net, x = nn.Linear(8, 4).half(), torch.randn(16, 8).half()
    wide = copy.deepcopy(net).float()
    gradient = torch.randn(16, 4).half() * 2.0**-12
    plain = float32_gradients(wide, lambda: wide(x.float()).backward(gradient.float()))
    try:
        with ada_loss.torch.backward():
            torch.autograd.backward(net(x), gradient)
    except RuntimeError as error:
        assert "would not be scaled" in str(error)
    else:
        assert_close(gradients_of(net), plain, db=40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_dtypes_keep_their_bits(net, dtype):
    net, x, target = net
    net.to(torch.float32 if dtype == torch.bfloat16 else dtype)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return cross_entropy(net(x), target)

    plain = float32_gradients(net, lambda: loss().backward())
    with ada_loss.torch.backward() as mode:
        loss().backward()
    assert_same_bits(gradients_of(net), plain)
    assert not mode.entered


def test_parts_in_bfloat16_and_float16():
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    both, x = nn.ModuleList([first, second]), torch.randn(16, 8)

    def loss(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            h = torch.tanh(first(x))
        with torch.autocast("cpu", torch.float16, enabled=low):
            return second(h).float().square().mean() * 2.0**SMALL

    plain = float32_gradients(both, lambda: loss(False).backward())
    GradScaler("cpu").scale(loss(True)).backward()
    assert_close(gradients_of(both), plain, db=25)
