"""Boxes as offsets from a model's default boxes, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from chainer.backends import cuda
from chainercv.links.model.ssd import MultiboxCoder

from overlap import overlaps

# From this overlap on a default box learns an object; below the other one it does in no case.
MATCH_THRESHOLD = 0.5
LEAST = 1e-6
# Overlaps that differ by less are equal. GluonCV computes them in float32.
TIE = 1e-6
# ChainerCV's, as in the paper.
VARIANCES = (0.1, 0.2)


@dataclass(frozen=True)
class BoxCoder:
    """Gives what ChainerCV's `MultiboxCoder` gives, bit for bit, without what it computes again each time.

    Attributes:
        centre, size: of the K default boxes, y and x one behind the other, float64 (2, K).
        corners: of the same boxes: y_min, x_min, y_max, x_max, float64 (4, K).
        variance: what offsets of centres and logarithms of sizes are divided by.
        threshold: overlap from which on a default box learns an object.
        ties: whether, as in GluonCV, a default box learns the object that it overlaps most also if it
            overlaps it exactly as much as the best one does.
    """

    centre: np.ndarray
    size: np.ndarray
    corners: np.ndarray
    variance: tuple[float, float]
    threshold: float = MATCH_THRESHOLD
    ties: bool = False

    @classmethod
    def of(cls, coder: MultiboxCoder, threshold: float = MATCH_THRESHOLD, ties: bool = False) -> BoxCoder:
        """ChainerCV's coder may be on a GPU; this one is on the CPU."""
        default = np.ascontiguousarray(cuda.to_cpu(coder._default_bbox).T)
        corners = _corners(default[:2], default[2:])
        return cls(default[:2], default[2:], corners, coder._variance, threshold, ties)

    def encode(self, bbox: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the default boxes have to learn: offsets float32 (K, 4) and classes int32 (K,), 0 for
        background.

        Args:
            bbox: float32 (R, 4), (y_min, x_min, y_max, x_max).
            label: int32 (R,), counted from 0.
        """
        n_default = self.size.shape[1]
        if not len(bbox):
            return np.zeros((n_default, 4), np.float32), np.zeros(n_default, np.int32)
        owner = self._owners(bbox)
        size = bbox[:, 2:] - bbox[:, :2]
        # Background has offsets too (of the last box), since ChainerCV gives some; nothing learns them.
        centre, size = (part.T.take(owner, axis=1) for part in (bbox[:, :2] + size / 2, size))
        offsets = np.empty((n_default, 4), np.float32)
        offsets.T[:2] = (centre - self.centre) / (self.variance[0] * self.size)
        offsets.T[2:] = np.log(size / self.size) / self.variance[1]
        return offsets, np.where(owner < 0, 0, label[owner] + 1).astype(np.int32)

    def decode(self, offsets: np.ndarray) -> np.ndarray:
        """Corners (4, K) as in `corners`, float64, of offsets (K, 4); the inverse of `encode`."""
        offsets = np.ascontiguousarray(offsets.T)
        with np.errstate(over="ignore"):
            size = self.size * np.exp(offsets[2:] * self.variance[1])
        return _corners(self.centre + offsets[:2] * self.variance[0] * self.size, size)

    def _owners(self, bbox: np.ndarray) -> np.ndarray:
        """Which box each default box has to learn, int (K,), -1 for none.

        Best pairs first, every box gets a default box of its own; then the default boxes that are left take
        the box that they overlap most, if it is enough, or if they tie.
        """
        overlap = overlaps(bbox.T, self.corners)
        owner = np.full(len(self.corners.T), -1)
        # Of equal pairs the one with the first default box wins.
        pairs = overlap.T.copy()
        while True:
            place, box = divmod(int(pairs.argmax()), len(bbox))
            if pairs[place, box] <= LEAST:
                break
            owner[place] = box
            pairs[place] = pairs[:, box] = 0
        most = overlap.max(axis=0)
        enough = most >= self.threshold
        if self.ties:
            favourite = overlap.argmax(axis=0)
            enough |= (most > LEAST) & (most + TIE >= overlap.max(axis=1)[favourite])
        (free,) = np.nonzero((owner < 0) & enough)
        owner[free] = overlap[:, free].argmax(axis=0)
        return owner


def _corners(centre: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(4, K) of centres and sizes (2, K)."""
    half = size / 2
    return np.concatenate([centre - half, centre + half])
