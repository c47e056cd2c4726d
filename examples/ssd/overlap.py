"""Intersection over union of boxes, rounded as in ChainerCV's `bbox_iou`."""

from __future__ import annotations

import numpy as np


def overlaps(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of each box with each other one, (N, M), in the wider of their dtypes.

    Coordinates come one behind the other, (4, N) and (4, M): y_min, x_min, y_max, x_max. NumPy computes with
    long rows several times as fast as with the two coordinates of a corner. Empty boxes, and boxes that are
    not finite, overlap nothing: their numbers are 0 or NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        union = _areas(ones)[:, None] + _areas(others)
        # One dtype: a mixture is slow. The areas keep their own, as in ChainerCV.
        first, last = ones.astype(union.dtype, copy=False).reshape(2, 2, -1, 1)
        start, end = others.astype(union.dtype, copy=False).reshape(2, 2, 1, -1)
        start = np.maximum(first, start)
        end = np.minimum(last, end)
        # Not below 0; two arrays of one shape are faster than an array and a number.
        common = np.multiply(*np.subtract(np.maximum(start, end, out=end), start, out=end))
        union -= common
        return np.divide(common, union, out=common)


def _areas(corners: np.ndarray) -> np.ndarray:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])
