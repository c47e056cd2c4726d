"""Steps whose gradients are not finite: skipped and left out of the log; what a run that diverges keeps."""

from __future__ import annotations

import numpy as np
import pytest
from runs import assert_same_end, meanwhile, press_ctrl_c, read, train, weights

from batches import Schedule
from encoding import TrainingSamples

PRECISIONS = {
    "float32": ("--dtype", "float32"),
    "adaptive": (),
    "fixed": ("--loss-scale-method", "fixed", "--init-scale", "8"),
    "delayed": ("--timing", "delayed"),
}
EACH_PRECISION = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@pytest.fixture
def spoil(monkeypatch):
    """Makes the images of some iterations not a number, given a batch size of 2."""
    original = TrainingSamples.sample

    def spoil(*iterations: int) -> None:
        seen = []

        def sample(self, epoch, index):
            seen.append(index)
            found = original(self, epoch, index)
            bad = (len(seen) + 1) // 2 in iterations
            return found._replace(image=np.full_like(found.image, np.nan)) if bad else found

        monkeypatch.setattr(TrainingSamples, "sample", sample)

    return spoil


@EACH_PRECISION
def test_one_bad_batch_is_skipped_and_the_run_goes_on(digits, tmp_path, spoil, precision, capfd):
    spoil(3)
    out = tmp_path / "run"
    assert train(digits, out, "--iteration", 5, *precision, "--loaders", 0) == 0
    result = read(out / "result.json")
    assert (result["outcome"], result["skipped_steps"]) == ("finished", 1)
    assert np.isfinite(result["map"])
    assert [row["skipped"] for row in read(out / "log.json")] == [0, 0, 1, 1, 1]
    assert all(np.isfinite(array).all() for array in weights(out).values())
    assert "skipped a step, 1 so far" in capfd.readouterr().err.lower() or precision != PRECISIONS["float32"]


def test_means_of_the_log_leave_skipped_steps_out(digits, tmp_path, spoil):
    each, together = tmp_path / "each", tmp_path / "together"
    brief = ("--iteration", 4, "--dtype", "float32", "--loaders", 0, "--step")
    spoil(2)
    assert train(digits, each, *brief) == 0
    spoil(2)
    assert train(digits, together, *brief, "--log-interval", 4) == 0
    rows = read(each / "log.json")
    assert ["main/loss" in row for row in rows] == [True, False, True, True]
    (row,) = read(together / "log.json")
    for name in ("main/loss", "main/loss/loc", "main/loss/conf"):
        assert row[name] == pytest.approx(np.mean([row[name] for row in rows if name in row]), rel=1e-6)


def test_a_skipped_step_changes_no_weight(digits, tmp_path, spoil):
    plain, spoiled = tmp_path / "plain", tmp_path / "spoiled"
    spoil(2)
    assert train(digits, spoiled, "--iteration", 2, "--dtype", "float32", "--loaders", 0) == 0
    spoil()
    assert train(digits, plain, "--iteration", 1, "--dtype", "float32", "--loaders", 0, "--step") == 0
    for name, array in weights(plain).items():
        np.testing.assert_array_equal(weights(spoiled)[name], array)


@EACH_PRECISION
def test_a_run_that_meets_nothing_else_diverges_and_keeps_its_last_good_weights(
    digits, tmp_path, spoil, precision, capsys
):
    good, out = tmp_path / "good", tmp_path / "run"
    brief = (*precision, "--loaders", 0, "--log-interval", 2, "--step")
    spoil(*range(6, 60))
    assert train(digits, out, "--iteration", 60, *brief) == 3
    result = read(out / "result.json")
    assert (result["outcome"], result["map"]) == ("diverged", None)
    assert result["iterations"] < 50
    assert result["message"].startswith("Training diverged: ")
    # After the fourth iteration there was a row, and with what it left the fifth step could be taken.
    assert result["message"].endswith("model.npz holds the last good weights, those after 4 iterations.")
    spoil()
    assert train(digits, good, "--iteration", 4, *brief, "--warm-up", 0) == 0
    for name, array in weights(good).items():
        np.testing.assert_array_equal(weights(out)[name], array, err_msg=name)
    assert "Traceback" not in capsys.readouterr().err


def test_a_resumed_run_counts_its_skipped_steps_on(digits, tmp_path, spoil, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    brief = ("--iteration", 6, "--dtype", "float32", "--loaders", 0, "--checkpoint-interval", 3)
    spoil(2, 5)
    assert train(digits, whole, *brief) == 0
    spoil(2)
    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "share", meanwhile(press_ctrl_c, after=4))
        assert train(digits, stopped, *brief) == 130
    spoil(2)
    assert train(digits, stopped, *brief, "--resume", "auto") == 0
    assert read(stopped / "result.json")["skipped_steps"] == 2
    assert_same_end(whole, stopped)


def test_the_best_weights_are_kept_beside_the_last(digits, tmp_path, monkeypatch):
    found = iter([0.2, 0.6, 0.4, 0.6])
    monkeypatch.setattr("training.mean_precision", lambda precisions: next(found))
    out, until_best = tmp_path / "run", tmp_path / "best"
    brief = ("--dtype", "float32", "--iteration")
    assert train(digits, out, *brief, 4, "--step", 1, 2, 3, "--lr", "1e-3") == 0
    assert read(out / "result.json")["map"] == 0.6
    monkeypatch.setattr("training.mean_precision", lambda precisions: 0.5)
    assert train(digits, until_best, *brief, 2, "--step", 1, "--lr", "1e-3") == 0
    with np.load(out / "best.npz") as best:
        for name, array in weights(until_best).items():
            np.testing.assert_array_equal(best[name], array, err_msg=name)
    assert any((weights(out)[name] != array).any() for name, array in weights(until_best).items())
