from __future__ import annotations

import math

import chainer
import numpy as np
import pytest
from chainercv.links.model.ssd import multibox_loss

from loss import MultiboxLoss, classification_losses, hard_negatives

N_CLASSES = 5


def random_batch(seed: int, positives: tuple[int, ...], n_boxes: int = 120):
    """Predictions and targets of one image per entry of `positives`, with so many positives in it."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((len(positives), n_boxes), np.int32)
    for row, count in zip(labels, positives, strict=True):
        row[rng.permutation(n_boxes)[:count]] = rng.integers(1, N_CLASSES, size=count)
    locs, gt_locs = rng.normal(scale=1.5, size=(2, len(positives), n_boxes, 4)).astype(np.float32)
    confs = rng.normal(size=(len(positives), n_boxes, N_CLASSES)).astype(np.float32)
    return locs, confs, gt_locs, labels


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


def sums_of_image(locs, confs, gt_locs, labels) -> tuple[float, float]:
    """Localization and classification loss of one image before any division, one box at a time."""
    loc, positives, negatives = 0.0, [], []
    for box, label in enumerate(labels):
        entropy = cross_entropy(confs[box].astype(float).tolist(), label)
        (positives if label else negatives).append(entropy)
        for difference in np.abs(locs[box].astype(float) - gt_locs[box]) if label else ():
            loc += difference**2 / 2 if difference < 1 else difference - 0.5
    hardest = sorted(negatives, reverse=True)[: 3 * len(positives)]
    return loc, sum(positives) + sum(hardest)


@pytest.mark.parametrize("positives", [(13, 23), (1, 0, 4), (40, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_batch_norm_divides_by_the_positives_of_the_batch(positives, seed):
    batch = random_batch(seed, positives)
    sums = np.array([sums_of_image(*image) for image in zip(*batch, strict=True)])
    losses = MultiboxLoss("batch")(*batch)
    np.testing.assert_allclose([loss.array for loss in losses], sums.sum(axis=0) / sum(positives), rtol=1e-5)


@pytest.mark.parametrize("positives", [(13, 23), (1, 0, 4), (40, 100)])
@pytest.mark.parametrize("seed", range(3))
def test_sample_norm_divides_by_the_positives_of_each_image(positives, seed):
    batch = random_batch(seed, positives)
    sums = np.array([sums_of_image(*image) for image in zip(*batch, strict=True)])
    means = [image / count for image, count in zip(sums, positives, strict=True) if count]
    losses = MultiboxLoss("sample")(*batch)
    np.testing.assert_allclose(
        [loss.array for loss in losses], np.sum(means, axis=0) / len(positives), rtol=1e-5
    )


def test_the_norms_of_13_and_23_positives():
    """Of the page "3 tips to boost performance": the images' norms sum up to the batch's, 36."""
    batch = random_batch(0, (13, 23))
    images = [[part[i : i + 1] for part in batch] for i in range(2)]
    loc, conf = (loss.array for loss in MultiboxLoss("batch")(*batch))
    alone = [MultiboxLoss("batch")(*image) for image in images]
    np.testing.assert_allclose(loc * 36, alone[0][0].array * 13 + alone[1][0].array * 23, rtol=1e-5)
    np.testing.assert_allclose(conf * 36, alone[0][1].array * 13 + alone[1][1].array * 23, rtol=1e-5)
    by_sample = [loss.array for loss in MultiboxLoss("sample")(*batch)]
    np.testing.assert_allclose(
        by_sample, np.mean([[part.array for part in pair] for pair in alone], axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_batch_norm_and_its_gradients_are_chainercvs(seed):
    locs, confs, gt_locs, labels = random_batch(seed, (5, 0, 30))
    gradients = []
    for loss_of in (MultiboxLoss("batch"), lambda *batch: multibox_loss(*batch, k=3)):
        inputs = [chainer.Variable(locs), chainer.Variable(confs)]
        loc_loss, conf_loss = loss_of(*inputs, gt_locs, labels)
        (loc_loss + conf_loss).backward()
        gradients.append([loc_loss.array, conf_loss.array, *(x.grad for x in inputs)])
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_a_batch_without_objects_costs_nothing(norm):
    locs, confs, gt_locs, labels = random_batch(0, (0, 0))
    inputs = [chainer.Variable(locs), chainer.Variable(confs)]
    loc_loss, conf_loss = MultiboxLoss(norm)(*inputs, gt_locs, labels)
    (loc_loss + conf_loss).backward()
    assert loc_loss.array == conf_loss.array == 0
    assert not inputs[0].grad.any()
    assert not inputs[1].grad.any()


@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(norm):
    batch = random_batch(1, (3, 20, 0, 8))
    whole = MultiboxLoss(norm)(*batch)
    halves = [[part[:2] for part in batch], [part[2:] for part in batch]]
    # Both ranks learn that the mean number of positives is (23 + 8) / 2.
    shares = [MultiboxLoss(norm, lambda count: 31 / 2)(*half) for half in halves]
    for total, first, second in zip(whole, *shares, strict=True):
        np.testing.assert_allclose(total.array, (first.array + second.array) / 2, rtol=1e-5)


def test_the_hardest_negatives_are_three_per_positive_of_each_image():
    rng = np.random.default_rng(6)
    losses = rng.random((3, 50))
    positive = np.zeros((3, 50), bool)
    positive[0, :4] = positive[1, 10:30] = True
    picked = hard_negatives(losses, positive)
    assert picked.sum(axis=1).tolist() == [12, 30, 0]
    assert not (picked & positive).any()
    assert losses[0, picked[0]].min() > losses[0, ~picked[0] & ~positive[0]].max()


def test_losses_of_huge_logits_are_finite():
    logits = np.array([[[1e4, -1e4, 0]]], dtype=np.float32)
    np.testing.assert_allclose(classification_losses(logits, np.array([[1]])), [[2e4]])


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="batch, sample"):
        MultiboxLoss("image")


@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_alpha_weighs_the_offsets_alone(norm):
    batch = random_batch(5, (13, 23))
    loc, conf = (loss.array for loss in MultiboxLoss(norm)(*batch))
    weighed = [loss.array for loss in MultiboxLoss(norm, alpha=0.25)(*batch)]
    np.testing.assert_array_equal(weighed, [loc / 4, conf])


@pytest.mark.parametrize("ratio", [0, 1, 7, 1000])
def test_so_many_negatives_count_for_each_positive(ratio):
    mb_locs, mb_confs, gt_locs, labels = random_batch(6, (13, 1))
    _, ours = MultiboxLoss("batch", negative_ratio=ratio)(mb_locs, mb_confs, gt_locs, labels)
    _, theirs = multibox_loss(mb_locs, mb_confs, gt_locs, labels, k=ratio)
    np.testing.assert_allclose(ours.array, theirs.array, rtol=1e-5)
