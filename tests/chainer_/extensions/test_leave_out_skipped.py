"""What a skipped step reports stays out of the log's means."""

import json

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer.training import StandardUpdater, Trainer, extensions

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.chainer.extensions import leave_out_skipped
from helpers import dtype

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logged(folder, bad, interval=4, *others):
    """The log of a training of 8 iterations; batches at `bad` are not finite."""
    x = np.random.default_rng(30).standard_normal((32, 4)).astype(np.float16)
    for iteration in bad:
        x[4 * iteration] = np.nan
    np.random.seed(0)
    with dtype("mixed16"):
        model = L.Classifier(AdaLossScaled(L.Linear(4, 3)))
    optimizer = prepare(chainer.optimizers.SGD(0.0).setup(model))
    data = chainer.datasets.TupleDataset(x, np.zeros(32, np.int32))
    iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
    trainer = Trainer(StandardUpdater(iterator, optimizer), (8, "iteration"), str(folder))
    trainer.extend(extensions.LogReport(trigger=(interval, "iteration")))
    for other in others:
        trainer.extend(other)
    trainer.run(show_loop_exception_msg=False)
    return json.loads((folder / "log").read_text()), optimizer


def test_means_are_those_of_the_other_steps(tmp_path):
    each, _ = logged(tmp_path / "each", [], 1)
    first, second = logged(tmp_path / "bad", [1, 3], 4, leave_out_skipped())[0]
    losses = [row["main/loss"] for row in each]
    assert first["main/loss"] == pytest.approx(np.mean([losses[0], losses[2]]))
    assert second["main/loss"] == pytest.approx(np.mean(losses[4:]))


def test_an_interval_of_skipped_steps_has_no_mean(tmp_path):
    rows, optimizer = logged(tmp_path, range(4), 4, leave_out_skipped())
    assert optimizer.entry_scale.skipped == 4
    assert "main/loss" not in rows[0] and "main/loss" in rows[1]


def test_what_extensions_observe_stays(tmp_path):
    observe = extensions.observe_value("rate", lambda trainer: trainer.updater.get_optimizer("main").lr)
    observe.trigger = (1, "iteration")
    rows, _ = logged(tmp_path, [0], 1, observe, leave_out_skipped())
    assert [row["rate"] for row in rows] == [0.0] * 8
    assert ["main/loss" in row for row in rows] == [False] + [True] * 7


def test_without_it_the_mean_is_not_a_number(tmp_path):
    rows, _ = logged(tmp_path, [1], 4)
    assert np.isnan(rows[0]["main/loss"])
