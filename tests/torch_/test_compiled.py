"""Models that are compiled with the backend: gradients as without, scaled within the compiled graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ada_loss.torch
from torch_.asserts import assert_close, assert_plain_float32, float32_gradients, gradients_of
from torch_.nets import loss_of

# What PyTorch's own compiler warns of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(*, half=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)
    )
    for parameter in net.parameters():
        parameter.data = parameter.data.half().float()
    return net.half() if half else net


def batch(size=8):
    return torch.randn(size, 12).half().float(), torch.randint(0, 5, (size,))


def float32_of(net, x, target, exponent):
    return float32_gradients(net, lambda: loss_of(net, x, target, exponent, float16=False).backward())


def compiled_gradients(net, model, x, target, exponent):
    loss = loss_of(model, x, target, exponent)
    with ada_loss.torch.backward():
        loss.backward()
    assert_plain_float32(net)
    found = gradients_of(net)
    net.zero_grad()
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("exponent", [-40, pytest.param(0, marks=SLOW), pytest.param(12, marks=SLOW)])
def test_gradients_of_a_compiled_model_do_not_depend_on_the_size_of_the_loss(exponent):
    net, (x, target) = network(), batch()
    plain = float32_of(net, x, target, exponent)
    model = torch.compile(net, backend=ada_loss.torch.backend)
    assert_close(compiled_gradients(net, model, x, target, exponent), plain, db=45)


def test_a_model_compiled_by_another_backend_loses_them_or_says_so():
    net, (x, target) = network(), batch()
    model = torch.compile(net, backend="aot_eager")
    loss = loss_of(model, x, target)
    with pytest.raises(RuntimeError, match="backend=ada_loss.torch.backend"), ada_loss.torch.backward():
        loss.backward()


def test_a_compiled_loss_function_and_a_scaler():
    net, (x, target) = network(), batch()
    plain = float32_of(net, x, target, -30)
    compiled = torch.compile(loss_of, backend=ada_loss.torch.backend)
    scaler = ada_loss.torch.GradScaler("cpu")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler.scale(compiled(net, x, target, -30)).backward()
    assert_close(gradients_of(net), plain, db=45)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.skipped == 0


def test_parameters_in_float16_get_true_gradients_in_float32():
    net, (x, target) = network(half=True), batch()
    wide = copy.deepcopy(net).float()
    plain = float32_gradients(wide, lambda: loss_of(wide, x, target, -30, float16=False).backward())
    model = torch.compile(net, backend=ada_loss.torch.backend)
    loss = F.cross_entropy(model(x.half()).float(), target) * 2.0**-30
    with ada_loss.torch.backward():
        loss.backward()
    assert_plain_float32(net)
    assert_close(gradients_of(net), plain, db=45)


def test_sizes_that_change_and_graphs_that_break():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(), nn.Linear(5, 5)

        def forward(self, x):
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(h)

    net = Broken()
    model = torch.compile(net, backend=ada_loss.torch.backend, dynamic=True)
    for size in (8, 5, 13):
        x, target = batch(size)
        assert_close(compiled_gradients(net, model, x, target, -30), float32_of(net, x, target, -30), db=40)


def test_activation_checkpointing_within_the_compiled_model():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    net, (x, target) = Checkpointed(), batch()
    plain = float32_of(net, x, target, -30)
    model = torch.compile(net, backend=ada_loss.torch.backend)
    assert_close(compiled_gradients(net, model, x, target, -30), plain, db=45)


def test_float32_models_keep_their_gradients():
    net, (x, target) = network(), batch()
    plain = float32_of(net, x, target, 0)
    model = torch.compile(net, backend=ada_loss.torch.backend)
    loss = loss_of(model, x, target, float16=False)
    with ada_loss.torch.backward():
        loss.backward()
    assert_close(gradients_of(net), plain, db=100)


def test_settings_other_than_the_scalers_are_refused():
    net, (x, target) = network(), batch()
    model = torch.compile(net, backend=ada_loss.torch.backend, options={"loss_scale_method": "fixed"})
    loss = loss_of(model, x, target)
    with pytest.raises(RuntimeError, match="compiled for other settings"), ada_loss.torch.backward():
        loss.backward()


def test_a_fixed_scale_within_a_compiled_model():
    net, (x, target) = network(), batch()
    config = {"loss_scale_method": "fixed", "init_scale": 2.0**20}
    plain = float32_of(net, x, target, -20)
    model = torch.compile(net, backend=ada_loss.torch.backend, options=config)
    loss = loss_of(model, x, target, -20)
    with ada_loss.torch.backward(ada_loss.torch.AdaLossConfig(**config)):
        loss.backward()
    assert_close(gradients_of(net), plain, db=40)
