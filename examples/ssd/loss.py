"""The training objective of SSD: smooth L1 on the offsets, softmax cross entropy on the classes.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, equations (1) to (3) and section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import chainer
import chainer.functions as F
import numpy as np
from chainer.backends.cuda import get_array_module

LOSS_NORMS = ("batch", "sample")
NEGATIVES_PER_POSITIVE = 3


def alone(n: float) -> float:
    """The mean over the ranks where there is only one."""
    return n


@dataclass(frozen=True)
class MultiboxLoss:
    """The loss of a batch.

    Attributes:
        norm: "batch" divides the sum over the batch by its number of positives, the batch being that of all
            ranks together; "sample" divides each image's sum by its own number and averages over the images.
            Images without positives add nothing.
        mean_over_ranks: the mean over all ranks of a number that each rank gives. Gradients are averaged over
            the ranks, so each one divides by the mean number of positives to end with the total.
        alpha: weight of the localization loss.
        negative_ratio: how many negatives count at most for each positive of an image.
    """

    norm: str = "batch"
    mean_over_ranks: Callable[[float], float] = alone
    alpha: float = 1.0
    negative_ratio: int = NEGATIVES_PER_POSITIVE

    def __post_init__(self) -> None:
        if self.norm not in LOSS_NORMS:
            raise ValueError(f"norm must be one of {', '.join(LOSS_NORMS)}, not {self.norm!r}.")

    def __call__(
        self,
        mb_locs: chainer.Variable,
        mb_confs: chainer.Variable,
        gt_mb_locs: np.ndarray,
        gt_mb_labels: np.ndarray,
    ) -> tuple[chainer.Variable, chainer.Variable]:
        """Localization loss times `alpha`, and classification loss, two float32 scalars.

        Args:
            mb_locs: predicted offsets, float32 (B, K, 4), K being the number of default boxes.
            mb_confs: predicted logits, float32 (B, K, classes with the background first).
            gt_mb_locs: the offsets to learn, float32 (B, K, 4).
            gt_mb_labels: the classes to learn, int32 (B, K), 0 for background.
        """
        mb_locs, mb_confs = chainer.as_variable(mb_locs), chainer.as_variable(mb_confs)
        positive = gt_mb_labels > 0
        weight = self._weight(positive)
        # Only positives and the hardest negatives count; gathering them leaves the other boxes out of the
        # graph.
        losses = classification_losses(mb_confs.array, gt_mb_labels)
        picked = positive | hard_negatives(losses, positive, self.negative_ratio)
        logits = mb_confs[picked]
        conf_losses = F.logsumexp(logits, axis=1) - F.select_item(logits, gt_mb_labels[picked])
        loc_losses = F.sum(F.huber_loss(mb_locs[positive], gt_mb_locs[positive], 1, reduce="no"), axis=-1)
        return (
            _weighted_sum(loc_losses, self.alpha * weight, positive),
            _weighted_sum(conf_losses, weight, picked),
        )

    def _weight(self, positive: np.ndarray) -> np.ndarray:
        """What each image's losses are multiplied by, float32 (B,)."""
        xp = get_array_module(positive)
        counts = positive.sum(axis=1)
        if self.norm == "batch":
            n_positive = self.mean_over_ranks(float(counts.sum()))
            return xp.full(len(counts), 1 / n_positive if n_positive else 0, dtype=np.float32)
        return (1 / (xp.maximum(counts, 1) * len(counts))).astype(np.float32)


def hard_negatives(
    losses: np.ndarray, positive: np.ndarray, ratio: int = NEGATIVES_PER_POSITIVE
) -> np.ndarray:
    """The negatives with the largest losses, `ratio` times as many as an image has positives.

    Args:
        losses: (B, K), not negative.
        positive: bool (B, K).

    Returns:
        bool (B, K).
    """
    xp = get_array_module(losses)
    # Positives go last, with keys above those of all negatives.
    rank = xp.where(positive, 1, -losses).argsort(axis=1).argsort(axis=1)
    wanted = xp.minimum(ratio * positive.sum(axis=1), (~positive).sum(axis=1))
    return rank < wanted[:, None]


def classification_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Softmax cross entropy of every box: logits (B, K, C) and labels (B, K) to (B, K)."""
    xp = get_array_module(logits)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = xp.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]
    return xp.log(xp.exp(shifted).sum(axis=-1)) - chosen


def _weighted_sum(losses: chainer.Variable, weight: np.ndarray, mask: np.ndarray) -> chainer.Variable:
    """Sum of the losses of the boxes in `mask`, each times its image's weight."""
    xp = get_array_module(weight)
    return F.sum(losses * xp.broadcast_to(weight[:, None], mask.shape)[mask])
