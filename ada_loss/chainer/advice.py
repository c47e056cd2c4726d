"""Sentences for scripts in which a part of mixed precision is missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import chainer

from ada_loss.chainer.scaling import Scaling

_logger = logging.getLogger("ada_loss")

_NOTHING_IS_FLOAT16 = (
    "Nothing in the model is float16, so that its gradients need no scale: for mixed precision put "
    "chainer.global_config.dtype = chainer.mixed16 before the model is made, and give it float16 inputs."
)
_UNSCALED = (
    "The float16 parameter %s got gradients from outside every scaled model, where small ones become zero: "
    "wrap the link that it is in with AdaLossScaled as well."
)


def tell_what_is_missing(target: chainer.Link, scalings: Sequence[Scaling]) -> None:
    """Log, once for each model, that an update came without float16, or with float16 gradients unscaled.

    Args:
        target: what an optimizer updates.
        scalings: what is kept on its scaled models.
    """
    for scaling in scalings:
        if not scaling.policy.has_met_float16 and scaling.decisions and _is_first(scaling, "float16"):
            _logger.warning(_NOTHING_IS_FLOAT16)
    unscaled = [path for path, parameter in target.namedparams() if getattr(parameter, "unscaled", False)]
    if unscaled and any([_is_first(scaling, "unscaled") for scaling in scalings]):
        _logger.warning(_UNSCALED, unscaled[0])


def _is_first(scaling: Scaling, what: str) -> bool:
    first = what not in scaling.told
    scaling.told.add(what)
    return first
