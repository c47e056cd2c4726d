"""The random changes to training images of SSD: colours, zooming out, cropping, resizing, flipping.

The recipe and its distributions are those of ChainerCV's SSD example (Liu et al., section 2.2 and 3.6). All
draws come from the generator that the caller passes in, so an image of an epoch looks the same whichever
process prepares it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from overlap import overlaps

INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
CROP_TRIALS = 50
# Bounds on the overlap of a crop with each box: (least, most).
CROP_CONSTRAINTS = ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.7, 1.0), (0.9, 1.0), (0.0, 1.0))
# OpenCV's hue of 8 bit images goes from 0 to 179.
HUES = 180
# All that a pixel of 8 bits may be.
VALUES = np.arange(256)


@dataclass(frozen=True)
class Recipe:
    """How far the changes may go.

    Attributes:
        largest_expansion: how many times the side of the image the canvas may have that it is put on; 1 for
            never.
        smallest_crop: the least share of the image's side that a crop keeps; 1 for never.
        flips: whether to mirror half of the images.
        smooth_resizing: resize linearly always, in place of an interpolation drawn from five.
    """

    largest_expansion: float = 4.0
    smallest_crop: float = 0.3
    flips: bool = True
    smooth_resizing: bool = False


VOC_RECIPE = Recipe()
# Mirrored, a digit is another one or none; and they are small enough.
DIGITS_RECIPE = Recipe(largest_expansion=1.0, smallest_crop=0.7, flips=False, smooth_resizing=True)


def augment(
    image: np.ndarray,
    bbox: np.ndarray,
    label: np.ndarray,
    side: int,
    fill: np.ndarray,
    recipe: Recipe,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A changed copy of an image, of size (3, side, side), float32, and the boxes and labels that are left in
    it.

    Args:
        image: RGB, uint8, (3, H, W).
        bbox: float32 (R, 4), (y_min, x_min, y_max, x_max).
        label: int32 (R,).
        side: height and width of the result.
        fill: colour around an image that is zoomed out, (3, 1, 1).
        recipe: how far the changes may go.
        rng: where all draws come from.
    """
    pixels = distort_colours(np.ascontiguousarray(image.transpose(1, 2, 0)), rng)
    if recipe.largest_expansion > 1 and rng.random() < 0.5:
        pixels, bbox = _expand(pixels, bbox, recipe.largest_expansion, fill, rng)
    if recipe.smallest_crop < 1:
        pixels, bbox, label = _crop(pixels, bbox, label, recipe.smallest_crop, rng)
    scale = np.array([side / pixels.shape[0], side / pixels.shape[1]] * 2, dtype=np.float32)
    method = cv2.INTER_LINEAR if recipe.smooth_resizing else INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
    pixels = cv2.resize(pixels.astype(np.float32), (side, side), interpolation=method)
    bbox = bbox * scale
    if recipe.flips and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
        bbox = np.stack([bbox[:, 0], side - bbox[:, 3], bbox[:, 2], side - bbox[:, 1]], axis=1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), bbox, label


def distort_colours(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each in half of the images. uint8 RGB, (H, W, 3)."""
    if rng.random() < 0.5:
        pixels = _affine(pixels, 1, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0
    if rng.random() < 0.5:
        return _turn_colours(_affine(pixels, contrast, 0), saturation, hue)
    return _affine(_turn_colours(pixels, saturation, hue), contrast, 0)


def draw_crop(
    height: int, width: int, bbox: np.ndarray, smallest: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A window (top, left, bottom, right) of the image: all of it, or one that overlaps every box enough.

    The candidates are all of the image and, for each constraint, the first of CROP_TRIALS windows that meets
    it. The first one found in a random order is a uniform draw from those that exist, and spares looking for
    the others.
    """
    for choice in rng.permutation(len(CROP_CONSTRAINTS) + 1) if len(bbox) else ():
        if choice == len(CROP_CONSTRAINTS):
            break
        windows = _draw_windows(height, width, smallest, rng)
        iou = overlaps(bbox.T, windows.astype(np.float32))
        least, most = CROP_CONSTRAINTS[choice]
        fits = np.flatnonzero((iou.min(axis=0) >= least) & (iou.max(axis=0) <= most))
        if len(fits):
            return tuple(windows[:, fits[0]].tolist())
    return 0, 0, height, width


def _draw_windows(height: int, width: int, smallest: float, rng: np.random.Generator) -> np.ndarray:
    """CROP_TRIALS windows of random size, shape and place: top, left, bottom, right, int (4, CROP_TRIALS)."""
    scale = rng.uniform(smallest, 1, size=CROP_TRIALS)
    least, most = np.maximum(0.5, scale**2), np.minimum(2, scale**-2)
    # As rng.uniform(least, most), which is slow on arrays.
    ratio = least + (most - least) * rng.random(CROP_TRIALS)
    size = np.array([height * scale / np.sqrt(ratio), width * scale * np.sqrt(ratio)]).astype(int)
    # A few pixels of a strip would be none.
    size = np.maximum(size, 1)
    corner = rng.integers(np.maximum([[height], [width]] - size, 1))
    return np.concatenate([corner, corner + size])


def _expand(
    pixels: np.ndarray, bbox: np.ndarray, largest: float, fill: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Put the image somewhere on a larger canvas."""
    height, width, _ = pixels.shape
    ratio = rng.uniform(1, largest)
    canvas_height, canvas_width = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(canvas_height - height + 1)), int(rng.integers(canvas_width - width + 1))
    canvas = np.empty((canvas_height, canvas_width, 3), dtype=pixels.dtype)
    canvas[:] = np.reshape(fill, 3)
    canvas[y : y + height, x : x + width] = pixels
    return canvas, bbox + np.array([y, x, y, x], dtype=np.float32)


def _crop(
    pixels: np.ndarray, bbox: np.ndarray, label: np.ndarray, smallest: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a window out. Boxes whose centre is outside go, the others are clipped."""
    height, width, _ = pixels.shape
    top, left, bottom, right = draw_crop(height, width, bbox, smallest, rng)
    start, end = np.array([[top, left], [bottom, right]], dtype=np.float32)
    first, last = bbox[:, :2], bbox[:, 2:]
    centre = (first + last) / 2
    first, last = np.maximum(first, start), np.minimum(last, end)
    kept = ((start <= centre) & (centre < end) & (first < last)).all(axis=1)
    clipped = np.concatenate([first - start, last - start], axis=1)
    return pixels[top:bottom, left:right], clipped[kept], label[kept]


def _affine(pixels: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """factor * pixels + offset, clipped and cut to whole numbers as in ChainerCV: 256 values to look up."""
    if factor == 1 and offset == 0:
        return pixels
    return cv2.LUT(pixels, np.clip(VALUES * factor + offset, 0, 255).astype(np.uint8))


def _turn_colours(pixels: np.ndarray, saturation: float, hue: int) -> np.ndarray:
    if saturation == 1 and hue == 0:
        return pixels
    hues, saturations, values = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))
    hues = cv2.LUT(hues, ((VALUES + hue) % HUES).astype(np.uint8))
    hsv = cv2.merge([hues, _affine(saturations, saturation, 0), values])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
