from __future__ import annotations

import numpy as np
import pytest
from chainercv.links import SSD300
from chainercv.links.model.ssd import MultiboxCoder
from chainercv.utils import bbox_iou

from coding import BoxCoder
from models import SmallSSD


@pytest.fixture(scope="module", params=[SmallSSD, SSD300])
def theirs(request) -> MultiboxCoder:
    return request.param(n_fg_class=10).coder


def random_objects(rng: np.random.Generator, n: int, side: float) -> tuple[np.ndarray, np.ndarray]:
    corner = rng.uniform(0, 0.6 * side, size=(n, 2))
    bbox = np.concatenate([corner, corner + rng.uniform(0.02, 0.5, size=(n, 2)) * side], axis=1)
    return bbox.astype(np.float32), rng.integers(10, size=n).astype(np.int32)


def assert_encoded_alike(theirs: MultiboxCoder, bbox: np.ndarray, label: np.ndarray) -> None:
    for ours, expected in zip(
        BoxCoder.of(theirs).encode(bbox, label), theirs.encode(bbox, label), strict=True
    ):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12])
def test_targets_are_chainercvs_bit_for_bit(theirs, n):
    rng = np.random.default_rng(n)
    for side in (96, 300):
        assert_encoded_alike(theirs, *random_objects(rng, n, side))


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_resolved_as_in_chainercv(theirs, seed):
    """Boxes between default boxes that lie alike overlap several of them, and equal boxes the same ones."""
    rng = np.random.default_rng(seed)
    centre = rng.integers(1, 11, size=(4, 2)) * 8.0
    half = rng.integers(1, 5, size=(4, 1)) * 4.0
    bbox = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)[[0, 1, 1, 2, 3, 0]]
    assert_encoded_alike(theirs, bbox, np.arange(6, dtype=np.int32))


def test_more_objects_than_default_boxes(theirs):
    few = MultiboxCoder((2,), ((2,),), (16,), (12, 20), (0.1, 0.2))
    rng = np.random.default_rng(3)
    assert_encoded_alike(few, *random_objects(rng, 40, 32))


def test_encoding_leaves_its_arguments_alone(theirs):
    bbox, label = random_objects(np.random.default_rng(4), 3, 96)
    before = bbox.copy(), label.copy()
    BoxCoder.of(theirs).encode(bbox, label)
    np.testing.assert_array_equal(bbox, before[0])
    np.testing.assert_array_equal(label, before[1])


@pytest.mark.parametrize("n_classes", [1, 5])
def test_decoded_boxes_are_chainercvs(theirs, n_classes):
    rng = np.random.default_rng(n_classes)
    offsets = rng.normal(size=(len(theirs._default_bbox), 4)).astype(np.float32)
    logits = np.zeros((len(offsets), 1 + n_classes), np.float32)
    expected, label, _ = theirs.decode(offsets, logits, nms_thresh=None, score_thresh=0)
    found = BoxCoder.of(theirs).decode(offsets)
    assert found.dtype == np.float64
    # ChainerCV adds sizes to corners, not halves of them to centres.
    np.testing.assert_allclose(found.T, expected[label == 0], rtol=1e-6, atol=1e-4)


def test_decoding_undoes_encoding(theirs):
    bbox, _ = random_objects(np.random.default_rng(2), 3, 96)
    coder = BoxCoder.of(theirs)
    offsets, label = coder.encode(bbox, np.arange(3, dtype=np.int32))
    (places,) = np.nonzero(label)
    assert len(places) >= 3
    np.testing.assert_allclose(coder.decode(offsets).T[places], bbox[label[places] - 1], atol=1e-3)


def test_offsets_that_overflow_decode_without_a_warning(theirs):
    offsets = np.full((len(theirs._default_bbox), 4), 1e4, np.float32)
    assert np.isinf(BoxCoder.of(theirs).decode(offsets)).all()


def random_ties(rng: np.random.Generator) -> np.ndarray:
    """Boxes that lie between default boxes, so that several overlap them alike."""
    centre = rng.integers(1, 11, size=(4, 2)) * 8.0
    half = rng.integers(1, 5, size=(4, 1)) * 4.0
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(10))
def test_ties_are_matched_as_in_gluoncv(theirs, seed):
    """Its `BipartiteMatcher(share_max=False)` behind its greedy matching, then its `MaximumMatcher`."""
    bbox = random_ties(np.random.default_rng(seed))
    overlap = bbox_iou(BoxCoder.of(theirs).corners.T, bbox)
    labels = np.arange(len(bbox), dtype=np.int32)
    _, one_each = theirs.encode(bbox, labels, iou_thresh=2)
    expected = one_each - 1
    for place, row in enumerate(overlap):
        best = row.argmax()
        if expected[place] < 0 and (row[best] + 1e-6 >= overlap[:, best].max() or row[best] >= 0.5):
            expected[place] = best
    _, found = BoxCoder.of(theirs, ties=True).encode(bbox, labels)
    np.testing.assert_array_equal(found - 1, expected)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_the_threshold_of_matching_is_chainercvs(theirs, threshold):
    bbox, label = random_objects(np.random.default_rng(8), 5, 96)
    ours = BoxCoder.of(theirs, threshold).encode(bbox, label)
    for mine, expected in zip(ours, theirs.encode(bbox, label, iou_thresh=threshold), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_variances_are_those_of_the_models_coder():
    bbox, label = random_objects(np.random.default_rng(9), 5, 96)
    theirs = MultiboxCoder((6, 3), ((2,), (2,)), (16, 32), (24, 48, 80), (0.3, 0.05))
    assert_encoded_alike(theirs, bbox, label)
