from __future__ import annotations

import math
from dataclasses import replace

import chainer
import numpy as np
import pytest
from chainercv.links.model.ssd import MultiboxCoder

import detector
from coding import BoxCoder
from detector import Boxes, Detector, detect_all, pick_boxes, softmax
from models import build_model

# Of the page "3 tips to boost performance": background, apple, orange, person, dog, cat.
SIX_LOGITS = np.array([-1, -2, 3, 4, 6.5, 6.4], dtype=np.float32)
DOG, CAT = 3, 4


@pytest.fixture
def coder() -> MultiboxCoder:
    return MultiboxCoder((6, 3), ((2,), (2,)), (16, 32), (24, 48, 80), (0.1, 0.2))


def random_outputs(coder: MultiboxCoder, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n_boxes = len(coder._default_bbox)
    loc = rng.normal(size=(n_boxes, 4)).astype(np.float32)
    return loc, rng.normal(scale=2, size=(n_boxes, 5)).astype(np.float32)


def test_softmax_of_the_six_logits():
    powers = [math.exp(logit) for logit in SIX_LOGITS.tolist()]
    np.testing.assert_allclose(softmax(SIX_LOGITS), [power / sum(powers) for power in powers], rtol=1e-6)
    # Dog and cat are nearly as likely, and together almost everything.
    np.testing.assert_allclose(softmax(SIX_LOGITS)[-2:], [0.4956, 0.4484], atol=5e-5)


def test_softmax_does_not_overflow():
    np.testing.assert_allclose(softmax(np.array([1000, 1000], dtype=np.float32)), [0.5, 0.5])


def test_per_class_decoding_keeps_the_second_most_probable_class(small_model):
    found = scores_of(small_model, "per-class")
    assert found[0, [DOG, CAT]].min() > 0.4


def test_argmax_decoding_keeps_the_most_probable_class_only(small_model):
    found = scores_of(small_model, "argmax")
    assert np.flatnonzero(found[0]).tolist() == [DOG]
    np.testing.assert_allclose(found[0, DOG], softmax(SIX_LOGITS)[1 + DOG])


def scores_of(model: chainer.Link, decoder: str) -> np.ndarray:
    return Detector(model, decoder=decoder)._scores(softmax(SIX_LOGITS[None]))


@pytest.fixture(scope="module")
def small_model():
    return build_model("small", 10, "lecun-uniform", seed=0)


def random_scores(coder: MultiboxCoder, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners (4, K) of boxes and their scores of four classes."""
    loc, logits = random_outputs(coder, seed)
    return BoxCoder.of(coder).decode(loc), softmax(logits)[:, 1:]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("score_thresh", [0.01, 0.3])
def test_boxes_are_those_of_chainercv(coder, seed, score_thresh):
    bbox, label, score = coder.decode(
        *random_outputs(coder, seed), nms_thresh=0.45, score_thresh=score_thresh
    )
    best = np.argsort(-score, kind="stable")
    ours = pick_boxes(*random_scores(coder, seed), score_thresh, limit=len(score) + 1)
    assert len(ours.score) == len(score) > 0
    np.testing.assert_array_equal(ours.label, label[best])
    np.testing.assert_allclose(ours.score, score[best], rtol=1e-5)
    np.testing.assert_allclose(ours.bbox, bbox[best], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 5, 20])
@pytest.mark.parametrize("distinct", [3, 10**6])
def test_at_most_the_best_boxes_are_left(coder, limit, distinct):
    """Also where many candidates have the same score, and the shortlist ends among them."""
    corners, scores = random_scores(coder, 0)
    scores = (np.ceil(scores * distinct) / distinct).astype(np.float32)
    everything = pick_boxes(corners, scores, 0.01, limit=10**6)
    few = pick_boxes(corners, scores, 0.01, limit=limit)
    assert len(everything.score) > 20
    for part, whole in zip(few, everything, strict=True):
        np.testing.assert_array_equal(part, whole[:limit])


def test_a_shortlist_that_does_not_fill_the_limit_is_not_all(coder):
    """The best candidates are all of the same place, and only one of them is kept."""
    corners, scores = random_scores(coder, 1)
    limit = 4
    crowd = detector.SHORTLIST * limit
    corners[:, :crowd] = [[0], [0], [10], [10]]
    scores[:crowd, 0] += 1
    few, everything = (pick_boxes(corners, scores, 0.01, limit=most) for most in (limit, 10**6))
    assert few.score[0] > 1 > few.score[1]
    for part, whole in zip(few, everything, strict=True):
        np.testing.assert_array_equal(part, whole[:limit])


def test_scores_that_are_not_finite_are_no_candidates(coder):
    corners, scores = random_scores(coder, 2)
    odd = scores.copy()
    odd[::3] = np.nan
    scores[::3] = 0
    for part, expected in zip(
        pick_boxes(corners, odd, 0.01, limit=5), pick_boxes(corners, scores, 0.01, limit=5), strict=True
    ):
        np.testing.assert_array_equal(part, expected)


def test_no_candidate_gives_no_box(coder):
    corners, scores = random_scores(coder, 0)
    empty = pick_boxes(corners, np.zeros_like(scores), 0.01)
    assert empty.bbox.shape == (0, 4)
    assert len(empty.label) == len(empty.score) == 0


def test_boxes_come_in_the_pixels_of_the_image(small_model):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, size=(3, 96, 96)).astype(np.float32)
    twice_as_wide = np.repeat(image, 2, axis=2)
    plain, wide = Detector(small_model, 0.05).detect([image, twice_as_wide])
    assert plain.bbox.max() < 2 * 96
    assert wide.bbox[:, [1, 3]].max() > 96 + 20
    assert wide.bbox[:, [0, 2]].max() < 2 * 96


@pytest.mark.parametrize("n_images", [0, 1, 4, 5])
def test_many_images_go_through_in_batches(small_model, n_images):
    images = np.random.default_rng(4).integers(0, 256, size=(n_images, 3, 96, 96)).astype(np.uint8)
    small = Detector(small_model, 0.08)
    found = detect_all(replace(small, batch_size=2), iter(images))
    assert len(found) == n_images
    for boxes, image in zip(found, images, strict=True):
        (alone,) = small.detect([image])
        np.testing.assert_allclose(boxes.score, alone.score, rtol=1e-4)


def test_large_float16_logits_do_not_overflow():
    with chainer.using_config("dtype", np.dtype(np.float16)):
        model = build_model("small", 10, "lecun-uniform", seed=0)
    for head in model.multibox.conf:
        head.b.array[1::11] = 30
    (found,) = Detector(model).detect([np.zeros((3, 96, 96), np.float32)])
    assert isinstance(found, Boxes)
    assert found.score.max() > 0.99
    assert np.isfinite(found.bbox).all()


def test_an_unknown_decoder_is_refused(small_model):
    with pytest.raises(ValueError, match="per-class, argmax"):
        Detector(small_model, decoder="best")
