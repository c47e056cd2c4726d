from __future__ import annotations

import numpy as np
import pytest
from chainercv import utils

from nms import non_maximum_suppression, suppress


def random_boxes(rng: np.random.Generator, n: int, dtype: type = np.float32) -> np.ndarray:
    corner = rng.uniform(0, 60, size=(n, 2))
    return np.concatenate([corner, corner + rng.uniform(0, 50, size=(n, 2))], axis=1).astype(dtype)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_keeps_what_chainercv_keeps(seed, dtype, limit):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 150))
    bbox, score = random_boxes(rng, n, dtype), rng.random(n).astype(np.float32)
    thresh = rng.uniform(0.2, 0.8)
    for scores in (None, score):
        ours = non_maximum_suppression(bbox, thresh, scores, limit)
        theirs = utils.non_maximum_suppression(bbox, thresh, scores, limit=limit)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("ordered", [False, True])
def test_thousands_of_boxes_are_kept_as_in_chainercv(ordered):
    rng = np.random.default_rng(5)
    bbox = random_boxes(rng, 3000)
    score = None if ordered else rng.permutation(3000).astype(np.float32)
    ours = non_maximum_suppression(bbox, 0.45, score)
    assert 10 < len(ours) < 2000
    np.testing.assert_array_equal(ours, utils.non_maximum_suppression(bbox, 0.45, score))


def test_equal_boxes_and_scores_are_kept_as_in_chainercv():
    rng = np.random.default_rng(6)
    bbox = np.floor(random_boxes(rng, 300) / 20) * 20
    bbox[:, 2:] += 20
    score = rng.integers(3, size=300).astype(np.float32)
    ours = non_maximum_suppression(bbox, 0.5, score)
    np.testing.assert_array_equal(ours, utils.non_maximum_suppression(bbox, 0.5, score))


def test_a_box_at_the_threshold_is_suppressed():
    # Intersection 3 and union 4.
    bbox = np.array([[0, 0, 4, 1], [0, 0, 3, 1]], dtype=np.float64)
    assert non_maximum_suppression(bbox, 0.75).tolist() == [0]
    assert non_maximum_suppression(bbox, np.nextafter(0.75, 1)).tolist() == [0, 1]


def test_a_suppressed_box_suppresses_nothing():
    bbox = np.array([[0, 0, 1, 10], [0, 4, 1, 14], [0, 8, 1, 18]], dtype=np.float32)
    assert non_maximum_suppression(bbox, 0.4).tolist() == [0, 2]


def test_boxes_of_other_groups_do_not_suppress():
    rng = np.random.default_rng(0)
    bbox = random_boxes(rng, 60)
    rows, groups = rng.integers(60, size=200), rng.integers(3, size=200)
    kept = suppress(bbox.T, 0.45, rows, groups)
    expected = []
    for group in range(3):
        places = np.flatnonzero(groups == group)
        expected += places[utils.non_maximum_suppression(bbox[rows[places]], 0.45)].tolist()
    assert kept.tolist() == sorted(expected)


def test_the_limit_counts_over_all_groups():
    rng = np.random.default_rng(1)
    bbox = random_boxes(rng, 60)
    rows, groups = rng.integers(60, size=200), rng.integers(3, size=200)
    everything = suppress(bbox.T, 0.45, rows, groups)
    assert len(everything) > 9
    np.testing.assert_array_equal(suppress(bbox.T, 0.45, rows, groups, limit=9), everything[:9])


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_boxes_that_are_not_finite_do_not_disturb_the_others(odd):
    bbox = np.array([[0, 0, 2, 2], [odd, 0, odd, 1], [0, 0, 2, 2]], dtype=np.float32)
    kept = non_maximum_suppression(bbox, 0.45)
    assert 0 in kept
    assert 2 not in kept
