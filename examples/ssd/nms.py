"""Non-maximum suppression in NumPy: what ChainerCV's gives, without its arithmetic for every candidate."""

from __future__ import annotations

import numpy as np

from overlap import overlaps

# Overlaps are computed for so many boxes at a time.
BLOCK = 64


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
    return order[suppress(bbox.T, thresh, order, np.zeros_like(order), limit)].astype(np.int32)


def suppress(
    corners: np.ndarray, thresh: float, rows: np.ndarray, groups: np.ndarray, limit: int | None = None
) -> np.ndarray:
    """Positions of the kept candidates, int (kept,): each overlaps none before it that is of its group.

    Going through all groups at once, best first, lets the search end at `limit`, however many candidates are
    left.

    Args:
        corners: of the boxes that the candidates share, (4, R): y_min, x_min, y_max, x_max.
        thresh: boxes of at least this intersection over union overlap.
        rows: which box a candidate has, int (N,), best candidate first.
        groups: which group (class) it belongs to, int (N,).
        limit: stop after so many.
    """
    # Boxes are numbered as they come, and a box is compared with those before it, and with few others.
    order = rows.tolist()
    number = {row: box for box, row in enumerate(dict.fromkeys(order))}
    corners = corners.take(list(number), axis=1)
    # Sets of boxes are whole numbers with a bit for each: what a box overlaps, and by group the kept boxes
    # and those that they overlap.
    bits = [1 << box for box in number.values()]
    overlapped: list[int] = []
    chosen = [0] * (groups.max(initial=-1) + 1)
    suppressed = chosen.copy()
    kept: list[int] = []
    for position, (row, group) in enumerate(zip(order, groups.tolist(), strict=True)):
        box = number[row]
        if box == len(overlapped):
            end = box + BLOCK
            overlapped += _sets(overlaps(corners[:, box:end], corners[:, :end]) >= thresh)
        if suppressed[group] & bits[box] or chosen[group] & overlapped[box]:
            continue
        kept.append(position)
        if len(kept) == limit:
            break
        chosen[group] |= bits[box]
        suppressed[group] |= overlapped[box]
    return np.array(kept, dtype=int)


def _sets(flags: np.ndarray) -> list[int]:
    """Every row of flags, bool (N, M), as a whole number whose lowest bit is the first flag."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    width, content = packed.shape[1], packed.tobytes()
    return [int.from_bytes(content[i : i + width], "little") for i in range(0, len(content), width)]
