"""Extremes by the bits of floats, for arrays of NumPy and CuPy.

Without the sign, bits order as the magnitudes do, and integers are several times faster than float16
arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Arrays without dimensions, because they are cheaper operands than scalars.
MASKS = {
    kind.itemsize: (np.array(np.iinfo(kind).max >> 1, kind), np.array(1, kind))
    for kind in map(np.dtype, ("u2", "u4", "u8"))
}
"""By size of the elements: the bits that make up a float's magnitude, and a one of the same integer type."""


def product_extremes(xp: Any, gy_rows: Any, weight_rows: Any) -> Any:
    """Smallest nonzero and largest |gy * W| over every pair in the same row, as a vector of two float64; the
    smallest is infinite where there is none."""
    gy_low, gy_high = _extremes_by_row(gy_rows)
    weight_low, weight_high = _extremes_by_row(weight_rows)
    meets = (gy_high > 0) & (weight_high > 0)
    with np.errstate(over="ignore", invalid="ignore"):
        low = xp.where(meets, gy_low * weight_low, np.inf).min()
        high = (gy_high * weight_high).max()
    return xp.stack([low, high])


def pair(extremes: list[float]) -> tuple[float, float]:
    """The two extremes, (0, 0) where there is none."""
    low, high = extremes
    return (low if high else 0.0), high


def _extremes_by_row(matrix: Any) -> tuple[Any, Any]:
    """Smallest nonzero and largest magnitude in every row, vectors of float64; 0 and 0 for a row of zeros."""
    # As scalars: CuPy takes no arrays of NumPy's.
    mask, one = (array[()] for array in MASKS[matrix.itemsize])
    bits = matrix.view(mask.dtype) & mask
    high = bits.max(axis=1)
    bits -= one  # zero becomes the largest integer, so the minimum passes it over
    low = bits.min(axis=1) + one
    return low.view(matrix.dtype).astype(np.float64), high.view(matrix.dtype).astype(np.float64)
