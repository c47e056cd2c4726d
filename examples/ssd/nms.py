"""Non-maximum suppression in NumPy: what ChainerCV's gives, without its arithmetic for every candidate."""

from __future__ import annotations

import numpy as np


def non_maximum_suppression(
    bbox: np.ndarray, thresh: float, score: np.ndarray | None = None, limit: int | None = None
) -> np.ndarray:
    """ChainerCV's function of this name: indices of the kept boxes, int32, best first.

    Args:
        bbox: (R, 4), (y_min, x_min, y_max, x_max).
        thresh: boxes of at least this intersection over union overlap.
        score: (R,), the higher the better; without it the first box is the best.
        limit: stop after so many.
    """
    order = np.arange(len(bbox)) if score is None else score.argsort()[::-1]
    return order[suppress(bbox, thresh, order, np.zeros_like(order), limit)].astype(np.int32)


def suppress(
    bbox: np.ndarray, thresh: float, rows: np.ndarray, groups: np.ndarray, limit: int | None = None
) -> np.ndarray:
    """Positions of the kept candidates, int (kept,): each overlaps none before it that is of its group.

    Going through all groups at once, best first, lets the search end at `limit`, however many candidates are
    left.

    Args:
        bbox: boxes (R, 4) that the candidates share.
        thresh: boxes of at least this intersection over union overlap.
        rows: which box a candidate has, int (N,), best candidate first.
        groups: which group (class) it belongs to, int (N,).
        limit: stop after so many.
    """
    alive = [np.ones(len(bbox), dtype=bool) for _ in range(groups.max(initial=-1) + 1)]
    apart: dict[int, np.ndarray] = {}
    kept: list[int] = []
    corners = np.ascontiguousarray(bbox.T)
    # Empty boxes, and boxes that are not finite, overlap nothing.
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (corners[2] - corners[0]) * (corners[3] - corners[1])
        for position, (row, group) in enumerate(zip(rows.tolist(), groups.tolist(), strict=True)):
            if alive[group][row]:
                kept.append(position)
                if len(kept) == limit:
                    break
                if row not in apart:
                    apart[row] = ~(_overlaps(corners, area, row) >= thresh)
                alive[group] &= apart[row]
    return np.array(kept, dtype=int)


def _overlaps(corners: np.ndarray, area: np.ndarray, row: int) -> np.ndarray:
    """Intersection over union of one box with all, (R,), given coordinates (4, R) and areas (R,)."""
    y_min, x_min, y_max, x_max = corners
    height = np.minimum(y_max, y_max[row]) - np.maximum(y_min, y_min[row])
    width = np.minimum(x_max, x_max[row]) - np.maximum(x_min, x_min[row])
    common = height * width * ((height > 0) & (width > 0))
    return common / (area[row] + area - common)
