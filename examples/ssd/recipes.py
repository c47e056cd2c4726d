"""How each model is trained where the command line does not say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is trained where the command line does not say.

    Attributes:
        dataset, pretrained, batchsize, lr, iteration, loaders: defaults of the options of these names.
        steps: shares of the iterations after which the learning rate falls to a tenth.
        warm_up: default of the option of this name, unless the batch size is `plain_batchsize`.
    """

    dataset: str
    pretrained: str
    batchsize: int
    lr: float
    iteration: int
    steps: tuple[float, ...]
    warm_up: int
    plain_batchsize: int | None
    loaders: int


ORIGINAL_RECIPE = Recipe(
    dataset="voc",
    pretrained="imagenet",
    batchsize=32,
    lr=1e-3,
    iteration=120_000,
    steps=(2 / 3, 5 / 6),
    warm_up=1000,
    plain_batchsize=32,
    loaders=4,
)
SMALL_RECIPE = Recipe(
    dataset="digits",
    pretrained="none",
    batchsize=8,
    lr=6e-3,
    iteration=1500,
    steps=(0.8,),
    warm_up=50,
    plain_batchsize=None,
    loaders=0,
)
RECIPES = {"small": SMALL_RECIPE, "ssd300": ORIGINAL_RECIPE, "ssd512": ORIGINAL_RECIPE}
