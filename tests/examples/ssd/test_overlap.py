from __future__ import annotations

import numpy as np
import pytest
from chainercv.utils import bbox_iou

from overlap import overlaps


def random_boxes(rng: np.random.Generator, n: int, dtype: type) -> np.ndarray:
    """Some on whole pixels, so that they touch and have the same edges; some empty."""
    corner = rng.uniform(0, 40, size=(n, 2))
    bbox = np.concatenate([corner, corner + rng.uniform(0, 30, size=(n, 2))], axis=1)
    return np.where(rng.random((n, 1)) < 0.5, np.floor(bbox), bbox).astype(dtype)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float32, np.float64), (np.float64,) * 2])
def test_overlaps_are_chainercvs_bit_for_bit(seed, dtypes):
    rng = np.random.default_rng(seed)
    ones, others = (random_boxes(rng, int(rng.integers(0, 60)), dtype) for dtype in dtypes)
    with np.errstate(invalid="ignore"):
        expected = bbox_iou(ones, others)
    found = overlaps(ones.T, others.T)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_a_box_overlaps_itself_and_no_box_beside_it():
    bbox = np.array([[0, 0, 2, 3], [0, 3, 2, 5], [2, 0, 4, 3]], np.float32)
    np.testing.assert_array_equal(overlaps(bbox.T, bbox.T), np.eye(3))


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_box_that_is_not_finite_overlaps_nothing(odd):
    bbox = np.array([[0, 0, 2, 2], [odd, 0, odd, 1], [0, odd, 3, odd], [0, 0, odd, odd]], np.float32)
    found = overlaps(bbox.T, bbox.T)
    np.fill_diagonal(found[:1], 0)
    assert not (found > 0).any()
