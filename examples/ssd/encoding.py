"""From an image and its objects to what the network takes and what it has to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from chainercv.links.model.ssd import SSD

from annotations import Objects
from augmentation import Recipe, augment
from coding import MATCH_THRESHOLD, BoxCoder


class Detections(Protocol):
    """A detection data set: see data_voc."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray: ...

    def objects(self, i: int) -> Objects: ...


class Sample(NamedTuple):
    """image float32 (3, side, side), offsets float32 (K, 4) and classes int32 (K,) of the K default boxes."""

    image: np.ndarray
    mb_loc: np.ndarray
    mb_label: np.ndarray


@dataclass(frozen=True)
class TrainingSamples:
    """Prepares samples; a pure function of (epoch, index), so any process may do it at any time.

    Attributes:
        dataset: images and objects.
        coder: encodes boxes for a model.
        side: height and width of the model's input.
        mean: subtracted from images, (3, 1, 1).
        recipe: how far images are changed.
        seed: of the draws.
    """

    dataset: Detections
    coder: BoxCoder
    side: int
    mean: np.ndarray
    recipe: Recipe
    seed: int

    @classmethod
    def of_model(
        cls,
        dataset: Detections,
        model: SSD,
        recipe: Recipe,
        seed: int,
        match_threshold: float = MATCH_THRESHOLD,
        match_ties: bool = False,
    ) -> TrainingSamples:
        return cls(
            dataset,
            BoxCoder.of(model.coder, match_threshold, match_ties),
            model.insize,
            np.asarray(model.mean, dtype=np.float32),
            recipe,
            seed,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, epoch: int, index: int) -> Sample:
        """The sample of an image as an epoch sees it."""
        rng = np.random.default_rng([self.seed, epoch, index])
        objects = self.dataset.objects(index)
        image, bbox, label = augment(
            self.dataset.image(index), objects.bbox, objects.label, self.side, self.mean, self.recipe, rng
        )
        return Sample(image - self.mean, *self.coder.encode(bbox, label))
