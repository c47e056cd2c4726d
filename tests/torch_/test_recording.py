"""Recording tells what a training in PyTorch is like, and changes nothing of it."""

import numpy as np
import pytest
import torch
from torch import nn

import ada_loss.torch as ada
from ada_loss.core.histogram import Histogram
from ada_loss.core.record_file import read
from ada_loss.core.records import ACTIVATION, BIAS_GRADIENT, INPUT_GRADIENT, WEIGHT_GRADIENT, Place

TINY = 2.0**-16
SCALERS = ("none", "torch", "ada")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def batches(count=4):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(count)
    ]


def scaler_of(name):
    if name == "none":
        return None
    return ada.GradScaler("cpu") if name == "ada" else torch.amp.GradScaler("cpu", init_scale=1024.0)


def loss_of(model, x, t, factor):
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    return factor * nn.functional.cross_entropy(y.float(), t)


def train(model, scaler, data, factor=TINY, record=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(3)
    for x, t in data:
        optimizer.zero_grad()
        loss = loss_of(model, x, t, factor)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if record is not None:
            record.end_step(loss.detach())


@pytest.mark.parametrize("name", SCALERS)
def test_a_training_that_is_recorded_has_the_same_bits(tmp_path, name):
    plain, watched = network(), network()
    train(plain, scaler_of(name), batches())
    scaler = scaler_of(name)
    with ada.record(watched, tmp_path, scaler=scaler, every=2) as record:
        train(watched, scaler, batches(), record=record)
    for (key, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())


@pytest.mark.parametrize("name", SCALERS)
def test_every_layer_is_recorded_in_both_directions(tmp_path, name):
    model, scaler = network(), scaler_of(name)
    with ada.record(model, tmp_path, scaler=scaler, every=2) as record:
        train(model, scaler, batches(), record=record)
    run = read(tmp_path)
    assert [step.step for step in run.steps] == [0, 2] and run.steps[0].loss > 0
    assert run.header.adaptive == (name == "ada")
    places = {record.place for record in run.places}
    assert {Place(path, ACTIVATION) for path in "0137"} <= places
    assert {Place(path, INPUT_GRADIENT) for path in "1237"} <= places
    assert {Place(f"{path}.weight", WEIGHT_GRADIENT) for path in "0137"} <= places
    assert {Place(f"{path}.bias", BIAS_GRADIENT) for path in "0137"} <= places
    assert Place("0.weight", WEIGHT_GRADIENT).layer == "0"


def gradients(model, x, t, *, half):
    torch.manual_seed(3)
    model.zero_grad()
    if half:
        loss_of(model, x, t, TINY).backward()
    else:
        (TINY * nn.functional.cross_entropy(model(x), t)).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def test_what_float16_lost_is_what_float32_has(tmp_path):
    """Element by element, against a float32 backward of the same gradient of the result."""
    ((x, t),) = batches(1)
    lossy = gradients(network(), x, t, half=True)
    truth = gradients(network(), x, t, half=False)
    model = network()
    with ada.record(model, tmp_path) as record:
        train(model, None, [(x, t)], record=record)
    found = {record.place.path: record for record in read(tmp_path).places}
    total = 0
    for name, expected in truth.items():
        lost = np.count_nonzero((lossy[name] == 0) & (expected != 0))
        assert found[name].lost == pytest.approx(lost, abs=max(1, 0.02 * expected.size)), name
        assert found[name].histogram == Histogram.of(lossy[name])
        total += lost
    assert total > 100, "the test would say nothing"


def test_the_same_truth_whatever_the_scaler(tmp_path):
    found = {}
    for name in SCALERS:
        model, scaler = network(), scaler_of(name)
        with ada.record(model, tmp_path / name, scaler=scaler) as record:
            train(model, scaler, batches(1), record=record)
        found[name] = {
            record.place: record.reference or record.histogram
            for record in read(tmp_path / name).places
            if record.place.kind != ACTIVATION
        }
    # Behind a normalization the gradient of a bias is zero but for rounding.
    places = found["ada"].keys() - {Place("0.bias", BIAS_GRADIENT)}
    for place in places:
        histogram = found["ada"][place]
        for name in SCALERS:
            assert found[name][place].largest == pytest.approx(histogram.largest, rel=0.05), (place, name)


def test_gradients_in_flight_are_recorded_with_what_they_carry(tmp_path):
    model, scaler = network(), scaler_of("ada")
    with ada.record(model, tmp_path, scaler=scaler) as record:
        train(model, scaler, batches(1), record=record)
    places = {record.place: record for record in read(tmp_path).places}
    inner = places[Place("3", INPUT_GRADIENT)]
    assert inner.exponent > 10
    assert inner.histogram.scaled(inner.exponent).underflow() == 0


def test_skipped_steps_are_recorded(tmp_path):
    data = batches(3)
    data[1][0][0, 0, 0, 0] = float("inf")
    for name in ("torch", "ada"):
        model, scaler = network(), scaler_of(name)
        with ada.record(model, tmp_path / name, scaler=scaler) as record:
            train(model, scaler, data, record=record)
        steps = read(tmp_path / name).steps
        assert [step.step for step in steps if step.skipped] == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "wrap, says",
    [
        (lambda model: "a model", "torch.nn.Module"),
        (nn.DataParallel, "model.module"),
        (torch.compile, "compiled"),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path, wrap, says):
    with pytest.raises(TypeError, match=says):
        ada.record(wrap(nn.Linear(2, 2)), tmp_path)


def test_attention_and_modules_with_several_results_are_watched(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.GRU(8, 8, batch_first=True)
            self.out = nn.Linear(8, 5)

        def forward(self, x):
            h, _ = self.inner(x, x, x)
            h, _ = self.rnn(h.float())
            return self.out(h[:, -1])

    for name in SCALERS:
        torch.manual_seed(0)
        model, scaler = Attention(), scaler_of(name)
        data = [(torch.randn(4, 6, 8), torch.randint(5, (4,)))]
        with ada.record(model, tmp_path / name, scaler=scaler) as record:
            train(model, scaler, data, record=record)
        places = {record.place for record in read(tmp_path / name).places}
        assert {Place("out.weight", WEIGHT_GRADIENT), Place("rnn", INPUT_GRADIENT)} <= places
