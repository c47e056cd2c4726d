"""What a user may hand over by mistake, each answered by one sentence that says what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import chainer
import numpy as np

from ada_loss.core.config import AdaLossConfig, meant

FORMER_NAMES = {
    "cfg": "give its entries as settings of their own, as in AdaLossScaled(model, scale_upper_bound=16)",
    "transforms": "layers are found without them; `filter` says which of them to scale",
    "n_uf_threshold": "it is called n_uf",
    "recorder": "extensions.observe_scales(layers=True) logs what the model records by itself",
    "verbose": "print(model.ada_loss.report) says what was converted",
    "power_of_two": "every scale is a power of two",
    "use_bound": "a bound of None leaves scales unbounded, as in scale_upper_bound=None",
}
"""Keywords of the code that was published with the paper, and what stands for them here."""

_OWN_KEYWORDS = ("filter", "layers", "output_dtype")
"""Keywords of `AdaLossScaled` that are no settings of a layer."""


def config_of(loss_scale_method: str, settings: Mapping[str, Any]) -> AdaLossConfig:
    """The configuration that keywords of `AdaLossScaled` describe.

    Args:
        loss_scale_method: the rule.
        settings: the other settings, by name.

    Raises:
        TypeError: a name is unknown; the message says which one is meant, or what stands for it here.
        ValueError: a value is impossible.
    """
    known = [field.name for field in fields(AdaLossConfig)]
    for name in settings:
        if name not in known:
            raise TypeError(f"AdaLossScaled takes no {name}=: {_instead_of(name, known)}")
    return AdaLossConfig(loss_scale_method=loss_scale_method, **settings)


def dtype_of_results(output_dtype: Any) -> np.dtype[Any] | None:
    """The dtype that float16 results of a scaled model are cast to; None to leave them.

    Raises:
        ValueError: it is no floating-point type.
    """
    if output_dtype is None:
        return None
    try:
        found = np.dtype(output_dtype)
    except TypeError:
        found = np.dtype(object)
    if found.kind != "f" or found.itemsize > 8:
        raise ValueError(
            "output_dtype must be float16, float32 or float64, or None to leave results as they are, "
            f"not {output_dtype!r}."
        )
    return found


def require_parts(filter: Any, layers: Any) -> None:
    """Check what is said of parts of a model.

    Raises:
        TypeError: `filter` is neither a function nor patterns, or `layers` are not settings by pattern.
    """
    patterns = (filter,) if isinstance(filter, str) else filter
    if not (filter is None or callable(filter) or _are_strings(patterns)):
        raise TypeError(
            "filter must be a function of path and link, or a pattern of paths such as '/body/*' or several, "
            f"not {_kind(filter)}."
        )
    by_pattern = isinstance(layers, Mapping) and _are_strings(layers)
    if not (layers is None or by_pattern and all(_are_settings(part) for part in layers.values())):
        raise TypeError(
            "layers must be a dictionary of settings by pattern, as in "
            "{'/head': {'loss_scale_method': 'fixed'}}."
        )


def require_config(config: Any) -> None:
    """Check settings of one layer.

    Raises:
        TypeError: they are neither an `AdaLossConfig` nor None.
    """
    if config is not None and not isinstance(config, AdaLossConfig):
        raise TypeError(
            "A layer takes its settings as an AdaLossConfig, such as "
            f"AdaLossConfig(loss_scale_method='fixed'), not as {_kind(config)}."
        )


def require_link(link: Any) -> None:
    """Check that what is to be scaled is a link.

    Raises:
        TypeError: it is anything else.
    """
    if isinstance(link, type) and issubclass(link, chainer.Link):
        raise TypeError(
            f"AdaLossScaled wraps a chainer.Link, not a class: write AdaLossScaled({link.__name__}(...))."
        )
    if isinstance(link, chainer.Optimizer):
        raise TypeError("AdaLossScaled wraps the model, and ada_loss.chainer.prepare takes the optimizer.")
    if not isinstance(link, chainer.Link):
        raise TypeError(f"AdaLossScaled wraps a chainer.Link, not {_kind(link)}.")


def require_optimizer(optimizer: Any) -> None:
    """Check that what is to be prepared is an optimizer of Chainer's that has a model.

    Raises:
        TypeError: it is no optimizer of Chainer's.
        ValueError: it has not been set up.
    """
    if isinstance(optimizer, chainer.Link):
        raise TypeError(
            "prepare takes the optimizer, not the model: prepare(optimizer) after optimizer.setup(model)."
        )
    if isinstance(optimizer, type):
        raise TypeError(
            f"prepare takes an optimizer, not a class: write prepare({optimizer.__name__}().setup(model))."
        )
    if not isinstance(getattr(optimizer, "actual_optimizer", optimizer), chainer.Optimizer):
        raise TypeError(f"prepare takes an optimizer of Chainer or of ChainerMN, not {_kind(optimizer)}.")
    if optimizer.target is None:
        raise ValueError("Call optimizer.setup(model) before ada_loss.chainer.prepare(optimizer).")


def _instead_of(name: str, known: list[str]) -> str:
    if name in FORMER_NAMES:
        return f"{FORMER_NAMES[name]}."
    return meant(name, [*known, *_OWN_KEYWORDS])


def _are_strings(values: Any) -> bool:
    return isinstance(values, Iterable) and all(isinstance(value, str) for value in values)


def _are_settings(part: Any) -> bool:
    return isinstance(part, AdaLossConfig) or isinstance(part, Mapping) and _are_strings(part)


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
