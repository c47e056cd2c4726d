"""`check` says of a model what float16 would do, without changing anything of it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import ada_loss
from ada_loss.__main__ import main
from ada_loss.chainer import AdaLossScaled
from ada_loss.core.records import INPUT_GRADIENT, WEIGHT_GRADIENT
from ada_loss.core.verdicts import Word
from helpers import dtype


class Small(chainer.Chain):
    """Two layers. factor: what the loss is multiplied by; gain: what the result of the first one is."""

    def __init__(self, factor=1.0, gain=1.0):
        super().__init__()
        self.factor, self.gain = factor, gain
        with self.init_scope():
            self.first = L.Linear(6, 8)
            self.second = L.Linear(8, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x) * self.gain))


def loss(model, x):
    return model.factor * F.mean_squared_error(model(x), F.cast(x, model(x).dtype)[:, :3])


def batch(rng, size=16):
    return rng.normal(size=(size, 6)).astype(np.float32)


def test_its_windows_are_those_of_the_float32_gradients(rng):
    model, x = Small(2.0**-10), batch(rng)
    found = ada_loss.check(model, x, loss)
    model.cleargrads()
    loss(model, x).backward()
    for path, parameter in model.namedparams():
        (place,) = [p for p in found.truth.gradients if p.place.path == path]
        magnitudes = np.abs(parameter.grad[parameter.grad != 0].astype(np.float64))
        low, high = place.window.lowest, place.window.highest
        assert (
            np.mean(magnitudes * 2.0**low < 2.0**-24)
            <= 1e-3
            < np.mean(magnitudes * 2.0 ** (low - 1) < 2.0**-24)
        )
        assert magnitudes.max() * 2.0**high <= 65504 < magnitudes.max() * 2.0 ** (high + 1)


@pytest.mark.parametrize(
    "factor, says",
    [(1.0, "Plain float16 does."), (2.0**-14, "fixed scale"), (2.0**-30, "fixed scale")],
)
def test_it_recommends_what_does(rng, factor, says):
    found = ada_loss.check(Small(factor), batch(rng, 64), loss)
    assert says in found.recommendation
    assert found.kept > 0.99
    assert all(len(line) <= 80 for line in str(found).splitlines())


def test_no_scale_helps_the_forward_pass(rng):
    found = ada_loss.check(Small(gain=1e6), batch(rng), loss)
    assert "float32" in found.recommendation or "first" in found.sentence
    big = Small()
    big.first.W.array *= 1e6
    found = ada_loss.check(big, batch(rng), loss)
    assert found.sentence.startswith("The forward pass overflows, first in /first")
    assert found.truth.verdicts[Word.OVERFLOW_FORWARD]


def test_it_changes_nothing(rng):
    with dtype("float16"):
        model = AdaLossScaled(Small())
    before = {path: p.array.copy() for path, p in model.namedparams()}
    state, policy = np.random.get_state()[1].copy(), model.ada_loss.policy.to_json()
    ada_loss.check(model, batch(rng).astype(np.float16), loss)
    for path, parameter in model.namedparams():
        assert parameter.dtype == np.float16
        np.testing.assert_array_equal(parameter.array, before[path])
        assert parameter.grad is None or np.isnan(parameter.grad).all()
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert model.ada_loss.policy.to_json() == policy


def test_random_images_do_where_no_batch_is_given():
    model = chainer.Sequential(L.Convolution2D(3, 4, 3, stride=8), F.relu, L.Linear(None, 5))
    model.insize = 32
    found = ada_loss.check(model, steps=2)
    assert len(found.truth.sampled) == 2
    assert {p.place.kind for p in found.truth.gradients} >= {INPUT_GRADIENT, WEIGHT_GRADIENT}


def test_pytorch_is_found_out_by_itself():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 36, 5))
    before = {name: p.clone() for name, p in model.named_parameters()}

    def small(model, x):
        return 2.0**-16 * (model(x) ** 2).mean()

    x = torch.randn(8, 3, 8, 8)
    found = ada_loss.check(model, x, small)
    assert found.truth.run.header.framework == "PyTorch"
    assert "fixed scale does" in found.recommendation and found.kept > 0.98
    small(model, x).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        (place,) = [p for p in found.truth.gradients if p.place.path == name]
        assert place.truth.largest == pytest.approx(float(parameter.grad.abs().max()), rel=1e-4)


@pytest.mark.parametrize("model", [None, 3, object(), np.zeros(3)])
def test_other_things_are_refused(model):
    with pytest.raises(TypeError, match="Chainer links and PyTorch modules"):
        ada_loss.check(model)


def test_what_cannot_be_guessed_is_asked_for():
    with pytest.raises(ValueError, match="batch"):
        ada_loss.check(chainer.Chain())
    with pytest.raises(ValueError, match="steps"):
        ada_loss.check(chainer.Chain(), steps=0)


class TestProgram:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "of_mine.py").write_text(
            textwrap.dedent("""
            import ada_loss.chainer
            import chainer.links as L, numpy as np
            def model(): return L.Linear(4, 3)
            def with_batch(): return L.Linear(4, 3), np.ones((2, 4), np.float32)
            def broken(): raise KeyError("no weights")
            def four(): return 1, 2, 3, 4
            number = 3
            """)
        )
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("name", ["of_mine:model", "of_mine:with_batch"])
    def test_prints_what_check_finds(self, name):
        command = [sys.executable, "-W", "ignore", "-m", "ada_loss", "check", name]
        environment = os.environ | {"PYTHONPATH": str(Path(ada_loss.__file__).parents[1])}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert "scales that suit" in result.stdout and "Checked in" in result.stdout

    @pytest.mark.parametrize(
        "arguments, says",
        [
            ([], "required"),
            (["check"], "required"),
            (["check", "of_mine"], "MODULE:CALLABLE"),
            (["check", "nowhere:model"], "no module nowhere"),
            (["check", "of_mine:nothing"], "has no nothing"),
            (["check", "of_mine:number"], "no callable"),
            (["check", "of_mine:broken"], "raised KeyError"),
            (["check", "of_mine:four"], "returned 4 things"),
            (["check", "of_mine:model", "--steps", "0"], "steps"),
        ],
    )
    def test_bad_input_is_one_sentence_and_status_2(self, arguments, says, capsys):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
        message = capsys.readouterr().err
        assert status == 2 and says in message and message.count("\n") == 1
