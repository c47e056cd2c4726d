"""Scales in the trainer's log."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extensions

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.extensions import observe_scales
from helpers import dtype
from toy import SIZE, batch, prepared, training

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logged(tmp_path, target, t, steps=6, *, own=(2, "iteration"), **options):
    """What LogReport holds after some steps on constant inputs; every second one is logged. own: the trigger
    of the extension itself."""
    x, _ = batch(np.random.default_rng(60), len(t))
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, t), 2, shuffle=False)
    updater = chainer.training.StandardUpdater(iterator, prepared(target))
    trainer = chainer.training.Trainer(updater, (steps, "iteration"), str(tmp_path))
    trainer.extend(observe_scales(**options), trigger=own)
    trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
    trainer.run()
    return trainer.get_extension("LogReport").log


def targets(*, infinite_at=None):
    t = np.ones((12, 3), np.float32)
    if infinite_at is not None:
        t[infinite_at] = np.inf
    return t


def test_the_log_tells_skipped_steps_and_the_entry_scale(tmp_path):
    with dtype("mixed16"):
        log = logged(tmp_path, training(init_scale=8), targets(infinite_at=5))
    assert [entry["ada_loss/skipped"] for entry in log] == [0, 1, 1]
    assert [entry["ada_loss/exponent"] for entry in log] == [3, 2, 2]


@pytest.mark.parametrize("own", [(1, "iteration"), (1, "epoch"), (5, "iteration")])
def test_every_row_of_the_log_has_the_values_of_its_end_whatever_the_own_trigger(tmp_path, own):
    with dtype("mixed16"):
        log = logged(tmp_path, training(init_scale=8), targets(infinite_at=5), own=own)
    assert [entry["ada_loss/skipped"] for entry in log] == [0, 1, 1]
    assert [entry["ada_loss/exponent"] for entry in log] == [3, 2, 2]


def test_every_optimizer_has_a_prefix_of_its_own():
    names = {observe_scales(name)._prefix for name in ("main", "generator", "critic")}
    assert names == {"ada_loss", "ada_loss/generator", "ada_loss/critic"}
    assert observe_scales(prefix="x")._prefix == "x"


def test_layers_are_told_only_if_asked_for(tmp_path):
    with dtype("mixed16"):
        log = logged(tmp_path, training(), targets())
    assert not any("shift" in name or "zeros" in name for name in log[-1])


def test_the_log_tells_every_layers_shift_and_share_of_zeros(tmp_path):
    with dtype("mixed16"):
        target = training()
        log = logged(tmp_path, target, targets(), layers=True)
    for decision in target.model.ada_loss.decisions:
        path, call, _ = decision.site
        name = f"/{path.strip('/')}" + (f":{call}" if call else "")
        assert log[-1][f"ada_loss/shift{name}"] == decision.shift
        assert log[-1][f"ada_loss/zeros{name}"] == pytest.approx(decision.range.zeros)
    assert {"ada_loss/shift/last", "ada_loss/shift/shared", "ada_loss/shift/shared:1"} <= log[-1].keys()


def test_a_gradient_that_underflows_shows_as_zeros(tmp_path):
    class Faint(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.first, self.last = L.Linear(SIZE, SIZE), L.Linear(SIZE, 3)

        def forward(self, x, t):
            return 1e-9 * F.sum(self.last(self.first(x)))

    with dtype("float16"):
        target = AdaLossScaled(Faint(), "abs_range", scale_upper_bound=1, output_dtype=None)
        log = logged(tmp_path, target, targets(), layers=True)
    assert log[-1]["ada_loss/zeros/last"] == 1


def test_fixed_measures_no_zeros(tmp_path):
    with dtype("mixed16"):
        log = logged(tmp_path, training(method="fixed"), targets(), layers=True)
    assert log[-1]["ada_loss/shift/last"] == 0 and "ada_loss/zeros/last" not in log[-1]


def test_several_scopes_have_their_paths_in_front(tmp_path):
    class Two(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.a = AdaLossScaled(L.Linear(SIZE, 3), init_scale=2, output_dtype=None)
                self.b = AdaLossScaled(L.Linear(3, 3), init_scale=4)

        def forward(self, x, t):
            return F.mean_squared_error(self.b(self.a(x)), t)

    with dtype("mixed16"):
        log = logged(tmp_path, Two(), targets(), prefix="scales")
    assert (log[-1]["scales/a/exponent"], log[-1]["scales/b/exponent"]) == (1, 2)
