"""What the stand-in data sets of the examples are drawn from: scikit-learn's digits and photographs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from errors import InputError


class Sources(NamedTuple):
    """scikit-learn's material: scans (N, 8, 8) of 0 to 1, labels (N,), photographs as uint8 (H, W, 3)."""

    scans: np.ndarray
    labels: np.ndarray
    photographs: list[np.ndarray]


def load_sources() -> Sources:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        raise InputError(
            "The digits set is made from scikit-learn's digits: pip install scikit-learn."
        ) from None
    digits = load_digits()
    return Sources(digits.images / 16.0, digits.target, load_sample_images().images)


def split_digits(n_digits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the digits that training images (four fifths) and test images (the rest) are made of."""
    order = np.random.default_rng([seed, 0]).permutation(n_digits)
    n_train = n_digits * 4 // 5
    return order[:n_train], order[n_train:]


def enlarge(scan: np.ndarray, size: int) -> np.ndarray:
    """A scan of 0 to 1 as (size, size), smoothly interpolated."""
    image = Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image), 0, 1)


def tint(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour of any hue that stands out from the region: light on dark, dark on light."""
    colour = rng.uniform(0, 80, size=3)
    return colour if region.mean() > 128 else 255 - colour
