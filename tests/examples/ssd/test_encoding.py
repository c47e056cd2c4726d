from __future__ import annotations

import random

import numpy as np
import pytest
from chainercv.links import SSD300
from chainercv.links.model.ssd import MultiboxCoder

from augmentation import VOC_RECIPE, Recipe
from coding import BoxCoder
from data_voc import TRAIN_PARTS, VOC_CLASSES, open_parts
from encoding import TrainingSamples
from models import build_model

# The two images of the page "3 tips to boost performance", 300 pixels wide: x_min, y_min, x_max, y_max.
PAGE_BOXES = (
    [[10, 20, 80, 90]],
    [[10, 10, 30, 30], [40, 40, 60, 60], [50, 50, 90, 90], [100, 110, 120, 140]],
)


def overlaps(default: np.ndarray, bbox: np.ndarray) -> np.ndarray:
    """Intersection over union of default boxes (centre, size) with boxes, one pair at a time."""
    result = np.zeros((len(default), len(bbox)))
    for i, (cy, cx, height, width) in enumerate(default):
        for j, (y0, x0, y1, x1) in enumerate(bbox.astype(float)):
            common_y = min(y1, cy + height / 2) - max(y0, cy - height / 2)
            common_x = min(x1, cx + width / 2) - max(x0, cx - width / 2)
            common = max(common_y, 0) * max(common_x, 0)
            result[i, j] = common / (height * width + (y1 - y0) * (x1 - x0) - common)
    return result


@pytest.fixture(scope="module")
def model():
    return build_model("small", len(VOC_CLASSES), "lecun-uniform", seed=0)


@pytest.fixture
def samples(devkit, model) -> TrainingSamples:
    dataset = open_parts(devkit, TRAIN_PARTS, VOC_CLASSES, use_difficult=False)
    return TrainingSamples.of_model(dataset, model, VOC_RECIPE, seed=3)


def test_a_sample_depends_on_seed_epoch_and_index_only(samples):
    first = samples.sample(epoch=2, index=1)
    random.seed(99)
    np.random.seed(99)
    samples.sample(epoch=0, index=3)
    for part, again in zip(first, samples.sample(epoch=2, index=1), strict=True):
        np.testing.assert_array_equal(part, again)


def test_epochs_show_different_samples(samples):
    images = [samples.sample(epoch, 1).image for epoch in range(4)]
    assert all((images[0] != image).any() for image in images[1:])


def test_seeds_show_different_samples(samples, model):
    other = TrainingSamples.of_model(samples.dataset, model, VOC_RECIPE, seed=4)
    assert (samples.sample(0, 0).image != other.sample(0, 0).image).any()


def test_sampling_does_not_touch_global_random_states(samples):
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].copy()
    for index in range(4):
        samples.sample(0, index)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_shapes_and_dtypes(samples, model):
    sample = samples.sample(0, 0)
    n_boxes = len(model.coder._default_bbox)
    assert [(part.shape, part.dtype) for part in sample] == [
        ((3, 96, 96), np.float32),
        ((n_boxes, 4), np.float32),
        ((n_boxes,), np.int32),
    ]


def test_the_mean_is_subtracted(samples):
    plain = Recipe(largest_expansion=1, smallest_crop=1, flips=False, smooth_resizing=True)
    unshifted = TrainingSamples(samples.dataset, samples.coder, 96, np.zeros((3, 1, 1), np.float32), plain, 3)
    shifted = TrainingSamples(samples.dataset, samples.coder, 96, samples.mean, plain, 3)
    difference = unshifted.sample(0, 0).image - shifted.sample(0, 0).image
    np.testing.assert_allclose(difference, np.full((3, 96, 96), 120), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_match_from_an_overlap_of_one_half_and_offsets_are_normalized(seed):
    coder = MultiboxCoder((6, 3), ((2,), (2,)), (16, 32), (24, 48, 80), (0.1, 0.2))
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, size=(4, 2))
    bbox = np.concatenate([corner, corner + rng.uniform(10, 40, size=(4, 2))], axis=1).astype(np.float32)
    label = rng.permutation(4).astype(np.int32)
    default = coder._default_bbox
    iou = overlaps(default, bbox)
    loc, classes = coder.encode(bbox, label)

    assert set(classes[classes > 0] - 1) == set(label), "every object has a default box"
    assert (classes[iou.max(axis=1) >= 0.5001] > 0).all()
    for place in np.flatnonzero(classes):
        y0, x0, y1, x1 = bbox[label.tolist().index(classes[place] - 1)]
        cy, cx, height, width = default[place]
        expected = [
            ((y0 + y1) / 2 - cy) / (0.1 * height),
            ((x0 + x1) / 2 - cx) / (0.1 * width),
            np.log((y1 - y0) / height) / 0.2,
            np.log((x1 - x0) / width) / 0.2,
        ]
        np.testing.assert_allclose(loc[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boxes, chainercvs, on_the_page", [(PAGE_BOXES[0], 13, 13), (PAGE_BOXES[1], 17, 23)])
def test_the_pages_boxes_match_as_many_default_boxes_as_it_says(boxes, chainercvs, on_the_page):
    """GluonCV, of which the page tells, lets all default boxes that tie for an object's best have it."""
    coder = SSD300(n_fg_class=20).coder
    bbox = np.array(boxes, np.float32)[:, [1, 0, 3, 2]]
    for ties, expected in ((False, chainercvs), (True, on_the_page)):
        _, label = BoxCoder.of(coder, ties=ties).encode(bbox, np.zeros(len(bbox), np.int32))
        assert (label > 0).sum() == expected
