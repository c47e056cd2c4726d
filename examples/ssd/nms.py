"""Non-maximum suppression in NumPy: what ChainerCV's gives, without its arithmetic for every candidate."""

from __future__ import annotations

import numpy as np

# Overlaps are computed for some boxes ahead, as many as make about so many numbers.
BLOCK = 2**16


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
    alive = np.ones((groups.max(initial=-1) + 1, len(bbox)), dtype=bool)
    ahead = max(1, BLOCK // max(1, len(bbox)))
    corners = np.ascontiguousarray(bbox.T)
    apart: dict[int, np.ndarray] = {}
    kept: list[int] = []
    for position, (row, group) in enumerate(zip(rows.tolist(), groups.tolist(), strict=True)):
        if alive[group, row]:
            kept.append(position)
            if len(kept) == limit:
                break
            if row not in apart:
                near = slice(position, position + ahead)
                living = rows[near][alive[groups[near], rows[near]]].tolist()
                due = [due for due in dict.fromkeys(living) if due not in apart]
                apart.update(zip(due, ~(_overlaps(corners, due) >= thresh), strict=True))
            alive[group] &= apart[row]
    return np.array(kept, dtype=int)


def _overlaps(corners: np.ndarray, rows: list[int]) -> np.ndarray:
    """Intersection over union of some boxes with all, (len(rows), R), given coordinates (4, R).

    Empty boxes, and boxes that are not finite, overlap nothing.
    """
    y_min, x_min, y_max, x_max = corners
    top, left, bottom, right = corners[:, rows, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (y_max - y_min) * (x_max - x_min)
        height = np.minimum(y_max, bottom) - np.maximum(y_min, top)
        width = np.minimum(x_max, right) - np.maximum(x_min, left)
        common = height * width * ((height > 0) & (width > 0))
        return common / (area[rows, None] + area - common)
