"""Image files of any kind as RGB of 8 bits, upright, as a viewer shows them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from errors import InputError, reason

# EXIF's tag for how a camera was held, and what turns the pixels of each value upright: whether rows and
# columns change places, then the steps along rows and columns.
ORIENTATION = 0x112
UPRIGHT = (False, 1, 1)
TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
# Modes of one channel with more than 8 bits; those of 16 bits are I;16 and its byte orders.
DEEP = ("I", "F")


def read_image(path: Path) -> np.ndarray:
    """An image file as RGB, (3, H, W), uint8, read-only; of a file with several frames the first.

    It is turned upright as its EXIF data say. Transparent parts show white. Of 8 bits a shade is as it is;
    shades of more bits, or floating-point ones, are scaled by their own range: black is 0 and white the end
    of the smallest range of 8, 10, 12, ... bits (4, 16, 64, ... or a part of these, of floating-point
    numbers) that holds the largest; where there are negative ones, they go from the smallest to the largest.

    Raises InputError if there is none or it can't be read, for whatever reason.
    """
    with _opened(path) as image:
        # What loading turns, as of TIFF, it turns for good, and takes the record of it away.
        image.load()
        pixels = _upright(_as_rgb(image), _orientation(image))
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False
    return pixels.transpose(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as `read_image` gives it, in most cases without reading more than its
    beginning. Raises InputError if even that can't be read."""
    with _opened(path) as image:
        if image.format == "TIFF" and _orientation(image) in TURNS:
            # Loading may turn it.
            image.load()
        turned, _, _ = TURNS.get(_orientation(image), UPRIGHT)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # About sizes that are allowed, and records beside the pixels.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    # Pillow's readers, and what they call, raise all sorts of errors on damaged files.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        why = "it is of no format that Pillow knows" if unknown else reason(error)
        raise InputError(f"{path} can't be read as an image ({why}): restore or remove it.") from None


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    # Damaged data about an image leave its pixels as they are.
    except Exception:
        return None


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Pixels (H, W, 3), turned and mirrored."""
    transposed, down, right = TURNS.get(orientation, UPRIGHT)
    return (pixels.transpose(1, 0, 2) if transposed else pixels)[::down, ::right]


def _as_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3), uint8."""
    if image.mode in DEEP or image.mode.startswith("I;"):
        return np.repeat(_shades(np.asarray(image))[..., None], 3, axis=2)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.asarray(ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _shades(values: np.ndarray) -> np.ndarray:
    """Shades of a range of their own in 8 bits; see `read_image`."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds numbers that are not finite")
    least, most = values.min(), values.max()
    black, white = (least, most) if least < 0 else (0.0, _white(most, whole=(values % 1 == 0).all()))
    span = white - black or 1.0
    return np.rint((values - black) / span * 255).astype(np.uint8)


def _white(most: float, whole: bool) -> float:
    """The end of the smallest range that holds `most`, which is not negative; see `read_image`."""
    mantissa, exponent = math.frexp(most)
    exponent -= mantissa == 0.5 and not whole
    bits = exponent + exponent % 2
    return 2.0 ** max(bits, 8) - 1 if whole else 2.0**bits
