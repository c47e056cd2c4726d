from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from chainercv.evaluations import eval_detection_voc

from annotations import Objects
from detector import Boxes
from evaluation import average_precisions, evaluate, mean_precision
from ranks import Alone


def objects(*entries: tuple[list[float], int, bool]) -> Objects:
    boxes, labels, difficult = zip(*entries, strict=True)
    return Objects(np.array(boxes, np.float32), np.array(labels, np.int32), np.array(difficult))


def found(*entries: tuple[list[float], int, float]) -> Boxes:
    boxes, labels, scores = zip(*entries, strict=True)
    return Boxes(np.array(boxes, np.float32), np.array(labels, np.int32), np.array(scores, np.float32))


LEFT, RIGHT, ELSEWHERE = [0, 0, 20, 20], [0, 40, 20, 60], [60, 60, 80, 80]


def test_a_perfect_detector_has_precision_one():
    true = objects((LEFT, 0, False), (RIGHT, 1, False))
    exact = found((LEFT, 0, 0.9), (RIGHT, 1, 0.8))
    np.testing.assert_allclose(average_precisions([(exact, true)], 2), [1, 1])


def test_the_metric_of_2007_takes_eleven_recalls():
    # The first guess finds one of two objects, the second none: recall ends at one half, with precision 1.
    true = objects((LEFT, 0, False), (RIGHT, 0, False))
    guesses = found((LEFT, 0, 0.9), (ELSEWHERE, 0, 0.8))
    np.testing.assert_allclose(average_precisions([(guesses, true)], 1), [6 / 11])


def test_difficult_objects_neither_help_nor_hurt():
    true = objects((LEFT, 0, False), (RIGHT, 0, True))
    np.testing.assert_allclose(average_precisions([(found((LEFT, 0, 0.9)), true)], 1), [1])
    both = found((RIGHT, 0, 0.95), (LEFT, 0, 0.9))
    np.testing.assert_allclose(average_precisions([(both, true)], 1), [1])


def test_classes_beyond_the_last_one_seen_have_no_precision():
    precisions = average_precisions([(found((LEFT, 1, 0.9)), objects((LEFT, 1, False)))], 5)
    np.testing.assert_allclose(precisions, [np.nan, 1, np.nan, np.nan, np.nan])


class Images(list):
    """A data set of (Boxes that a detector finds, Objects)."""

    def image(self, i):
        return i

    def objects(self, i):
        return self[i][1]


class OneOf(Alone):
    """A rank whose shares meet in a list."""

    def __init__(self, rank, size, shares):
        self.rank, self.size, self.shares = rank, size, shares

    def gather(self, value):
        self.shares.append(value)
        return self.shares if self.rank == 0 else []


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_the_shares_of_all_ranks_count_as_one_set(n_ranks, monkeypatch):
    rng = np.random.default_rng(0)
    results = Images()
    for _ in range(7):
        corner = rng.uniform(0, 50, size=(4, 2))
        bbox = np.concatenate([corner, corner + 20], axis=1).astype(np.float32)
        label = rng.integers(3, size=4).astype(np.int32)
        moved = Boxes(bbox + rng.normal(scale=4, size=(4, 4)).astype(np.float32), label, rng.random(4))
        results.append((moved, Objects(bbox, label, rng.random(4) < 0.2)))
    expected = eval_detection_voc(
        *zip(*(boxes for boxes, _ in results), strict=True),
        *zip(*(true for _, true in results), strict=True),
        use_07_metric=True,
    )["ap"]
    monkeypatch.setattr("evaluation.detect_all", lambda detector, images: [results[i][0] for i in images])
    shares = []
    detector = SimpleNamespace(model=SimpleNamespace(n_fg_class=3))
    *others, first = (
        evaluate(detector, results, OneOf(rank, n_ranks, shares)) for rank in reversed(range(n_ranks))
    )
    np.testing.assert_array_equal(first, expected)
    assert others == [None] * (n_ranks - 1)


def test_classes_without_objects_do_not_count_in_the_mean():
    assert mean_precision(np.array([np.nan, 0.5, 1.0])) == 0.75
    assert mean_precision(np.full(3, np.nan)) is None


@pytest.mark.parametrize("difficult", [True, None])
def test_without_an_object_that_counts_no_class_has_a_precision(difficult, recwarn):
    true = (
        objects((LEFT, 0, True)) if difficult else Objects(*(array[:0] for array in objects((LEFT, 0, True))))
    )
    for guesses in (found((LEFT, 0, 0.9)), Boxes(*(array[:0] for array in found((LEFT, 0, 0.9))))):
        assert np.isnan(average_precisions([(guesses, true)], 3)).all()
    assert not list(recwarn)
