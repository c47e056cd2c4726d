"""The yardstick, on a network small enough to check it by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import json
import math

import chainer
import fidelity
import numpy as np
import pytest
from chainer import functions as F
from fidelity_cases import MLP, Case
from fidelity_measure import compare, make_subject, plain_backward, signal_to_noise, sweep
from fidelity_report import ORACLE, Cell, finding, shortfalls, write

MULTIPLIERS = range(-30, 19, 8)


def batch_of_noise(rng):
    inputs = rng.normal(size=(20, 6)).astype(np.float16).astype(np.float32)
    return (inputs,), (rng.integers(4, size=20).astype(np.int32),)


class BiasBeforeSoftmax(MLP):
    """An MLP whose outputs all move by one more parameter, which no softmax notices."""

    def __init__(self) -> None:
        super().__init__(width=12, depth=3, classes=4)
        with self.init_scope():
            self.unnoticed = chainer.Parameter(0.5, (1,))

    def forward(self, x):
        y = super().forward(x)
        return y + F.broadcast_to(F.expand_dims(self.unnoticed, 0), y.shape)


CASE = Case("tiny", BiasBeforeSoftmax, batch_of_noise, F.softmax_cross_entropy, steps=20)


@pytest.fixture(scope="module")
def subject():
    return make_subject(CASE, seed=3, steps=0)


@pytest.fixture(scope="module")
def scales(subject):
    return sweep(plain_backward(CASE, subject.model, subject.batch), subject.reference)


@pytest.fixture(scope="module")
def cells():
    return list(fidelity.measure_case(CASE, seed=3, multipliers=MULTIPLIERS))


def of(cells, method, stage="initial"):
    return {cell.m: cell for cell in cells if cell.method == method and cell.stage == stage}


def test_a_parameter_without_a_true_gradient_does_not_count(subject):
    paths = {path for path, _ in subject.model.namedparams()}
    assert paths - set(subject.reference) == {"/unnoticed"}


def test_the_reference_is_the_gradient_of_the_float16_weights(subject):
    inputs, (labels,) = subject.batch
    x = inputs[0].astype(np.float64)
    *hidden, last = [
        (layer.W.array.astype(np.float64), layer.b.array.astype(np.float64)) for layer in subject.model
    ]
    for weight, bias in hidden:
        x = np.maximum(x @ weight.T + bias, 0)
    powers = np.exp(x @ last[0].T + last[1])
    gy = (powers / powers.sum(axis=1, keepdims=True) - np.eye(4)[labels]) / len(labels)
    np.testing.assert_allclose(subject.reference["/2/W"], gy.T @ x, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(subject.reference["/2/b"], gy.sum(axis=0), rtol=1e-4, atol=1e-7)


def test_signal_to_noise_is_in_decibels():
    signal = np.array([3.0, -4.0])
    assert signal_to_noise(signal + [0.05, 0.0], signal) == pytest.approx(40)
    assert signal_to_noise(signal, signal) == math.inf
    assert signal_to_noise(np.zeros(2), signal) == pytest.approx(0)
    assert signal_to_noise(np.array([3.0, np.nan]), signal) == -math.inf


def test_a_sweep_goes_from_nothing_arrives_to_everything_overflows(scales):
    ks = sorted(scales.qualities)
    assert ks == list(range(ks[0], ks[-1] + 1))
    assert all(q.snr <= 0 for q in scales.at(ks[0]).values())
    assert all(q.snr == -math.inf for q in scales.at(ks[-1]).values())
    assert scales.at(ks[0] - 5) is scales.at(ks[0]) and scales.at(ks[-1] + 5) is scales.at(ks[-1])


def test_underflow_falls_from_everything_to_nothing(subject, scales):
    shares = [q.underflow for k in sorted(scales.qualities) for p, q in scales.at(k).items() if p == "/1/W"]
    assert shares[0] == 1 and min(shares) == 0
    found = plain_backward(CASE, subject.model, subject.batch)(-14)
    lost = (found["/1/W"] == 0) & scales.keepable["/1/W"]
    quality = compare(found, subject.reference, scales.keepable)["/1/W"]
    assert 0 < quality.underflow == lost.sum() / scales.keepable["/1/W"].sum() < 1


def test_every_cell_is_measured_once(cells):
    keys = [(c.stage, c.m, c.method) for c in cells]
    assert len(keys) == len(set(keys)) == 2 * len(MULTIPLIERS) * 5


@pytest.mark.parametrize("method", ["none", "dynamic"])
def test_no_fixed_scale_is_better_than_the_best(cells, method):
    short = shortfalls(cells)
    assert all(short["tiny", stage, m, method] >= 0 for stage in ("initial", "trained") for m in MULTIPLIERS)


def test_without_a_scale_gradients_are_lost_at_both_ends(cells):
    none = of(cells, "none")
    assert none[-30].underflow == 1 and none[-30].snr <= 0
    assert none[18].overflowed
    assert none[2].snr == pytest.approx(of(cells, ORACLE)[2].snr, abs=0.1)


def test_dynamic_scaling_settles_below_overflow(cells, scales):
    for m, cell in of(cells, "dynamic").items():
        assert 0 <= cell.log2_scale <= 15
        next_overflows = any(q.snr == -math.inf for q in scales.at(m + cell.log2_scale + 1).values())
        assert next_overflows or cell.log2_scale == 15


def test_auto_does_not_care_what_the_loss_is_multiplied_by(cells):
    for stage in ("initial", "trained"):
        ratios = [cell.snr for cell in of(cells, "auto", stage).values()]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), abs=1e-6)


def test_auto_keeps_its_bar(cells):
    for (_, _, _, method), short in shortfalls(cells).items():
        assert method != "auto" or short <= 1
    assert all(cell.underflow <= 1e-3 for cell in cells if cell.method == "auto")


def test_the_same_seed_gives_the_same_cells(cells):
    again = list(fidelity.measure_case(CASE, seed=3, multipliers=MULTIPLIERS[:2]))
    assert again == [cell for cell in cells if cell.m in MULTIPLIERS[:2]]


def test_table_plot_and_json_are_written(cells, tmp_path):
    write(tmp_path / "new" / "folder", cells, {"seed": 3})
    folder = tmp_path / "new" / "folder"
    rows = json.loads((folder / "fidelity.json").read_text(), parse_constant=pytest.fail)["cells"]
    assert len(rows) == len(cells)
    assert all(row["snr"] is None for row, cell in zip(rows, cells, strict=True) if cell.overflowed)
    page = (folder / "README.md").read_text()
    assert "| tiny initial |" in page and "| tiny trained |" in page
    assert (folder / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        fidelity.main(["--models", "alexnet"])
    assert caught.value.code == 2
    assert "mlp20" in capsys.readouterr().err


def test_the_finding_names_the_cells_furthest_below_and_ahead_of_the_best_fixed_scale():
    def cell(m, method, snr, underflow=0.0):
        return Cell("net", "initial", m, method, snr, "/W", underflow, "/b", 0, 2)

    cells = [cell(m, ORACLE, 30.0) for m in (0, 4, 8)]
    cells += [cell(0, "auto", 29.5), cell(4, "auto", 45.0), cell(8, "auto", 30.0, underflow=0.002)]
    text = finding(cells)
    assert "furthest below the best fixed scale in net initial at m = 0, by 0.50 dB" in text
    assert "ahead of it in net initial at m = 4, by 15.00 dB" in text
    assert "0 gradients overflow" in text and "0.200%, in net initial at m = 8 (/b)" in text
