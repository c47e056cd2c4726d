"""What a rule has to know of a layer before it can choose a scale, from the layer's arrays.

On a GPU measurements are begun while backward runs, which does not wait for them, and finished together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ada_loss.arrays.statistics import (
    NOTHING,
    ONE,
    Begun,
    Statistics,
    begin,
    begin_product_extremes,
    combine,
    fetch,
    module_of,
)
from ada_loss.core.config import AdaLossConfig

_OF_SMALLEST = ("abs_range", "element_wise_range")
"""The rules that look at the smallest magnitudes."""


class Measurement(NamedTuple):
    """What a rule knows of a layer, in Python numbers.

    gradient: statistics of gy.
    weight: statistics of W; None where a gradient is only cast, not multiplied by weights.
    fan: how many products are summed for one element of gx at most.
    products: where measured, the smallest nonzero and the largest magnitude of an element of gy times a
        weight that it meets.
    """

    gradient: Statistics
    weight: Statistics | None = None
    fan: int = 1
    products: tuple[float, float] | None = None

    @property
    def cast(self) -> bool:
        """Whether a gradient is only cast."""
        return self.weight is None

    @property
    def factor(self) -> Statistics:
        """Statistics of what gy is multiplied by."""
        return self.weight or ONE

    @property
    def zero(self) -> bool:
        """Whether gx is zero because every product is."""
        return not self.gradient.nonzero or not self.factor.nonzero or self.products == (0.0, 0.0)

    @property
    def smallest_term(self) -> float:
        """The smallest that a nonzero product of an element of gy and a weight can be."""
        return self.products[0] if self.products else self.gradient.smallest * self.factor.smallest

    @property
    def largest_term(self) -> float:
        """The largest that a product of an element of gy and a weight can be."""
        return self.products[1] if self.products else self.gradient.largest * self.factor.largest


UNMEASURED = Measurement(NOTHING)
"""What `fixed` needs to know."""


def measure(
    config: AdaLossConfig, gy: Any, weight: Any, fan: int, *, channel_axis: int | None = 0
) -> Measurement:
    """What `begin_measurement` describes; on a GPU this waits for it."""
    return fetch([begin_measurement(config, gy, weight, fan, channel_axis)])[0]


def begin_measurement(
    config: AdaLossConfig,
    gy: Any,
    weight: Any,
    fan: int,
    channel_axis: int | None = 0,
    summarize_weight: Callable[..., Begun[Statistics]] = begin,
) -> Begun[Measurement]:
    """What the configured rule needs to know of a layer, without waiting for a GPU.

    gy: the layer's output gradient, channels (or features) along axis 1, a NumPy or CuPy array of any float
        type.
    weight: the layer's weight, of the same module; None where a gradient is cast to float16.
    fan: products in one sum, out_channels * kh * kw of a convolution, out_features of a linear layer; not
        looked at for a cast.
    channel_axis: the axis of `weight` that runs over gy's channels (1 in a deconvolution); only
        `element_wise_range` looks at it. None where the two share no channels (a matrix product of
        activations): any element of gy may then meet any of `weight`.
    summarize_weight: what to use for the statistics of weights in place of `statistics.begin`.
    """
    method = config.loss_scale_method
    if method == "fixed":
        return UNMEASURED
    smallest = method in _OF_SMALLEST
    if weight is None:
        logs = method == "approx_range" and config.cast_distribution == "log_normal"
        return combine(Measurement, begin(gy, smallest=smallest, logs=logs))
    products = None
    if method == "element_wise_range" and channel_axis is not None:
        products = _begin_products(gy, weight, channel_axis)
    summary = summarize_weight(weight, smallest=smallest)
    return combine(Measurement, begin(gy, smallest=smallest), summary, fan, products)


def _begin_products(gy: Any, weight: Any, channel_axis: int) -> Begun[tuple[float, float]]:
    """Smallest nonzero and largest |gy * W| over every pair that shares a channel."""
    channels = gy.shape[1]
    gy_rows = module_of(gy).moveaxis(gy, 1, 0).reshape(channels, -1)
    return begin_product_extremes(gy_rows, _rows(weight, channel_axis, channels))


def _rows(weight: Any, channel_axis: int, channels: int) -> Any:
    """The weights as a matrix with a row for each channel; in a grouped deconvolution, whose groups share
    `channel_axis`, the channels of the first group come first."""
    groups = channels // weight.shape[channel_axis]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return module_of(weight).moveaxis(grouped, channel_axis + 1, 1).reshape(channels, -1)
