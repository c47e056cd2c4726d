"""Measures of a layer's arrays what a rule has to know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ada_loss.arrays.library import library_of, summarize
from ada_loss.core.config import AdaLossConfig
from ada_loss.core.deferred import Deferred, Ready, combine
from ada_loss.core.measurement import UNMEASURED, Factor, Measurement, Statistics


def measure(
    config: AdaLossConfig,
    gy: Any,
    factor: Factor | None = None,
    summarize_weight: Callable[..., Deferred[Statistics]] = summarize,
) -> Deferred[Measurement]:
    """What the configured rule needs to know of a layer, without waiting for a device.

    Args:
        config: the settings.
        gy: the layer's output gradient, channels (or features) along axis 1.
        factor: what gy is multiplied by, an array of the same library; None at a cast.
        summarize_weight: what to use for the statistics of the weight.
    """
    rule = config.rule
    if not rule.measures:
        return Ready(UNMEASURED)
    needs = rule.needs(config, factor is None)
    gradient = summarize(gy, amin=needs.amin, logs=needs.logs)
    if factor is None:
        return combine(Measurement, gradient)
    weight = summarize_weight(factor.weight, amin=needs.amin)
    if not needs.products or factor.channel_axis is None:
        return combine(lambda gy, weight: Measurement(gy, weight, factor.fan), gradient, weight)
    products = _product_extremes(gy, factor.weight, factor.channel_axis)
    return combine(
        lambda gy, weight, products: Measurement(gy, weight, factor.fan, products), gradient, weight, products
    )


class WeightStatistics:
    """Statistics of weights that are used several times in a step, computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], tuple[Any, Deferred[Statistics]]] = {}

    def summarize(self, weight: Any, *, amin: bool = False) -> Deferred[Statistics]:
        """What `summarize` finds, or found in this step."""
        # The array is kept, so that no other one gets its id.
        key = id(weight), amin
        if key not in self._known:
            self._known[key] = weight, summarize(weight, amin=amin)
        return self._known[key][1]

    def clear(self) -> None:
        """Begin a step, in which weights may be others."""
        self._known.clear()


def _product_extremes(gy: Any, weight: Any, channel_axis: int) -> Deferred[tuple[float, float]]:
    """Smallest nonzero and largest |gy * W| over every pair that shares a channel."""
    library = library_of(gy)
    channels = gy.shape[1]
    gy_rows = library.module.moveaxis(gy, 1, 0).reshape(channels, -1)
    return library.product_extremes(gy_rows, _rows(library.module, weight, channel_axis, channels))


def _rows(xp: Any, weight: Any, channel_axis: int, channels: int) -> Any:
    """The weights as a matrix with a row for each channel; in a grouped deconvolution, whose groups share
    `channel_axis`, the channels of the first group come first."""
    groups = channels // weight.shape[channel_axis]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return xp.moveaxis(grouped, channel_axis + 1, 1).reshape(channels, -1)
