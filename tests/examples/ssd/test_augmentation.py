from __future__ import annotations

import random
from unittest import mock

import cv2
import numpy as np
import pytest
from chainercv import transforms
from chainercv.links.model.ssd import random_crop_with_bbox_constraints
from chainercv.links.model.ssd import transforms as reference
from chainercv.utils import bbox_iou

import augmentation
from augmentation import CROP_CONSTRAINTS, DIGITS_RECIPE, VOC_RECIPE, Recipe, augment, draw_crop

FILL = np.array((123, 117, 104), np.float32).reshape(3, 1, 1)
NO_OBJECTS = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
UNCHANGED = Recipe(largest_expansion=1, smallest_crop=1, flips=False, smooth_resizing=True)


def random_image(rng: np.random.Generator, height: int = 70, width: int = 90):
    image = rng.integers(0, 256, size=(3, height, width), dtype=np.uint8)
    corner = rng.uniform(0, 40, size=(3, 2))
    bbox = np.concatenate([corner, corner + rng.uniform(8, 28, size=(3, 2))], axis=1).astype(np.float32)
    return image, bbox, np.arange(3, dtype=np.int32)


class Scripted:
    """Stands in for a generator, or for the module `random`: gives the draws that it was told to give."""

    def __init__(self, *draws):
        self._draws = list(draws)

    def _next(self, *args, **kwargs):
        return self._draws.pop(0)

    random = uniform = integers = randrange = randint = _next

    def __del__(self):
        assert not self._draws, "not all draws were used"


# Brightness, contrast, saturation, hue: what is drawn for each, None where it is left as it is.
DISTORTIONS = [
    (20.7, None, None, None),
    (-31.2, None, None, None),
    (None, 1.4, None, None),
    (None, None, 0.6, None),
    (None, None, None, 11),
    (None, None, None, -17),
    (-5.5, 0.7, 1.3, -4),
]


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("values", DISTORTIONS)
def test_colours_are_distorted_as_in_chainercv(values, contrast_first):
    image, _, _ = random_image(np.random.default_rng(0))
    brightness, *others = values

    def chosen(value, yes, no):
        return [no] if value is None else [yes, value]

    ours = [*chosen(brightness, 0.1, 0.9)]
    for value in others:
        ours += chosen(value, 0.1, 0.9)
    ours += [0.1 if contrast_first else 0.9]
    contrast, saturation, hue = (chosen(value, 1, 0) for value in others)
    order = [contrast, saturation, hue] if contrast_first else [saturation, hue, contrast]
    theirs = [*chosen(brightness, 1, 0), int(contrast_first), *(draw for part in order for draw in part)]

    pixels = augmentation.distort_colours(np.ascontiguousarray(image.transpose(1, 2, 0)), Scripted(*ours))
    with mock.patch.object(reference, "random", Scripted(*theirs)):
        expected = reference.random_distort(image.astype(np.float32))
    # OpenCV goes to hue and back through 8 bits; the order of its channels may change the last one.
    difference = np.abs(pixels.transpose(2, 0, 1).astype(int) - expected)
    assert difference.max() <= 2
    assert (difference == 0).mean() > 0.9


def test_crops_meet_a_constraint_or_are_the_whole_image():
    rng = np.random.default_rng(1)
    whole = 0
    for _ in range(200):
        _, bbox, _ = random_image(rng)
        top, left, bottom, right = draw_crop(70, 90, bbox, 0.3, rng)
        assert 0 <= top < bottom <= 70
        assert 0 <= left < right <= 90
        if (top, left, bottom, right) == (0, 0, 70, 90):
            whole += 1
            continue
        iou = bbox_iou(np.array([[top, left, bottom, right]], np.float32), bbox)
        assert any(least <= iou.min() and iou.max() <= most for least, most in CROP_CONSTRAINTS)
        assert bottom - top >= 0.29 * 70 / np.sqrt(2)
        assert 0.45 < (right - left) / 90 / ((bottom - top) / 70) < 2.2
    assert 0 < whole < 200


def test_crops_are_distributed_as_in_chainercv():
    bbox = np.array([[20, 30, 60, 70]], np.float32)
    image = np.zeros((3, 90, 100), np.uint8)
    rng = np.random.default_rng(2)
    ours = [draw_crop(90, 100, bbox, 0.3, rng) for _ in range(300)]
    random.seed(2)
    theirs = []
    for _ in range(300):
        _, param = random_crop_with_bbox_constraints(image, bbox, return_param=True)
        y, x = param["y_slice"], param["x_slice"]
        theirs.append((y.start, x.start, y.stop, x.stop))
    # Means and spreads of the four edges; their standard errors are about one pixel.
    np.testing.assert_allclose(np.mean(ours, axis=0), np.mean(theirs, axis=0), atol=4)
    np.testing.assert_allclose(np.std(ours, axis=0), np.std(theirs, axis=0), atol=4)
    shares = [np.mean([window == (0, 0, 90, 100) for window in windows]) for windows in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.08)


def test_an_image_without_objects_is_not_cropped():
    assert draw_crop(50, 60, np.zeros((0, 4), np.float32), 0.3, np.random.default_rng(0)) == (0, 0, 50, 60)


@pytest.mark.parametrize("seed", range(5))
def test_boxes_are_cropped_as_in_chainercv(seed):
    rng = np.random.default_rng(seed)
    image, bbox, label = random_image(rng)
    pixels = image.transpose(1, 2, 0)
    with mock.patch.object(augmentation, "draw_crop", lambda *args: (10, 20, 50, 60)):
        cut, kept, kept_label = augmentation._crop(pixels, bbox, label, 0.3, rng)
    expected, param = transforms.crop_bbox(bbox, slice(10, 50), slice(20, 60), False, return_param=True)
    np.testing.assert_array_equal(cut, pixels[10:50, 20:60])
    np.testing.assert_allclose(kept, expected)
    np.testing.assert_array_equal(kept_label, label[param["index"]])


def test_a_zoomed_out_image_lies_in_the_fill_colour():
    image, bbox, label = random_image(np.random.default_rng(3))
    canvas, moved = augmentation._expand(image.transpose(1, 2, 0), bbox, 4.0, FILL, Scripted(2.0, 30, 45))
    assert canvas.shape == (140, 180, 3)
    np.testing.assert_array_equal(canvas[30:100, 45:135], image.transpose(1, 2, 0))
    outside = np.ones(canvas.shape[:2], bool)
    outside[30:100, 45:135] = False
    assert (canvas[outside] == FILL.reshape(3)).all()
    np.testing.assert_allclose(moved, bbox + [30, 45, 30, 45])


def test_boxes_follow_the_pixels():
    """A bright square on black stays inside its box, whatever is done to the image."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        image = np.zeros((3, 80, 100), np.uint8)
        y, x = rng.integers(10, 40, size=2)
        image[:, y : y + 24, x : x + 30] = 255
        bbox = np.array([[y, x, y + 24, x + 30]], np.float32)
        recipe = Recipe(largest_expansion=2, smallest_crop=0.5, flips=True, smooth_resizing=True)
        with mock.patch.object(augmentation, "distort_colours", lambda pixels, rng: pixels):
            changed, boxes, label = augment(
                image, bbox, np.array([7], np.int32), 96, np.zeros((3, 1, 1)), recipe, rng
            )
        bright = np.argwhere(changed[0] > 128)
        if len(boxes):
            assert label.tolist() == [7]
            found = [*bright.min(axis=0), *(bright.max(axis=0) + 1)]
            np.testing.assert_allclose(boxes[0], found, atol=2)


def test_flipping_is_chainercvs():
    image, bbox, label = random_image(np.random.default_rng(4), 96, 96)
    recipe = Recipe(largest_expansion=1, smallest_crop=1, flips=True, smooth_resizing=True)
    with mock.patch.object(augmentation, "distort_colours", lambda pixels, rng: pixels):
        changed, boxes, _ = augment(image, bbox, label, 96, FILL, recipe, Scripted(0.1))
    np.testing.assert_array_equal(changed, image[:, :, ::-1])
    np.testing.assert_allclose(boxes, transforms.flip_bbox(bbox, (96, 96), x_flip=True))


def test_resizing_is_opencvs_and_scales_the_boxes():
    image, bbox, label = random_image(np.random.default_rng(5))
    with mock.patch.object(augmentation, "distort_colours", lambda pixels, rng: pixels):
        changed, boxes, _ = augment(image, bbox, label, 96, FILL, UNCHANGED, np.random.default_rng(0))
    expected = cv2.resize(image.transpose(1, 2, 0).astype(np.float32), (96, 96))
    np.testing.assert_array_equal(changed, expected.transpose(2, 0, 1))
    np.testing.assert_allclose(boxes, transforms.resize_bbox(bbox, (70, 90), (96, 96)), rtol=1e-6)


@pytest.mark.parametrize("recipe", [VOC_RECIPE, DIGITS_RECIPE])
def test_an_image_without_objects_passes(recipe):
    image, _, _ = random_image(np.random.default_rng(6))
    for seed in range(10):
        changed, bbox, label = augment(
            image,
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int32),
            96,
            FILL,
            recipe,
            np.random.default_rng(seed),
        )
        assert changed.shape == (3, 96, 96)
        assert bbox.shape == (0, 4)
        assert len(label) == 0


def test_digits_are_never_mirrored():
    assert not DIGITS_RECIPE.flips


@pytest.mark.parametrize("recipe", [VOC_RECIPE, DIGITS_RECIPE], ids=["voc", "digits"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 40), (3, 40), (300, 4), (2, 2), (1, 5000)])
def test_strips_are_augmented_like_any_other_image(shape, recipe):
    height, width = shape
    image = np.full((3, *shape), 100, np.uint8)
    bbox = np.float32([[0, 0, height, width], [0, 0, height / 2, width / 2]])
    for seed in range(150):
        rng = np.random.default_rng(seed)
        pixels, boxes, labels = augment(image, bbox, np.arange(2), 30, np.zeros((3, 1, 1), "f"), recipe, rng)
        assert pixels.shape == (3, 30, 30)
        assert np.isfinite(pixels).all()
        assert len(boxes) == len(labels)
        assert np.isfinite(boxes).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert boxes.min(initial=0) >= -1e-4
        assert boxes.max(initial=0) <= 30 + 1e-4
