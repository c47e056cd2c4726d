"""Chainer's functions that are decision points, with a name and settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import chainer.functions as F

from ada_loss.chainer.settings import require_config
from ada_loss.chainer.tagging import Naming, active_recorder
from ada_loss.core.config import AdaLossConfig


def named(name: str | None = None, config: AdaLossConfig | None = None) -> AbstractContextManager[None]:
    """Within it decision points are recorded under `name`, and choose by `config`; None leaves what would be.

    Without effect on what is no part of a scaled model.
    """
    require_config(config)
    recorder = active_recorder()
    return Naming(name, config) if recorder is None else recorder.named(name, config)


def _with_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Chainer's that takes `name` and `config` as well."""

    @functools.wraps(function)
    def apply(*args: Any, name: str | None = None, config: AdaLossConfig | None = None, **kwargs: Any) -> Any:
        with named(name, config):
            return function(*args, **kwargs)

    name = function.__name__
    apply.__doc__ = f"`chainer.functions.{name}`; its decisions are recorded as `name` and made by `config`."
    apply.__signature__ = _with_keywords(inspect.signature(function), "name", "config")  # type: ignore[attr-defined]
    return apply


def _with_keywords(signature: inspect.Signature, *names: str) -> inspect.Signature:
    """A signature with further keyword arguments, which are optional."""
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    parameters = [*signature.parameters.values(), *more]
    # `**kwargs` comes last.
    return signature.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))


batch_matmul = _with_name(F.batch_matmul)
cast = _with_name(F.cast)
convolution_1d = _with_name(F.convolution_1d)
convolution_2d = _with_name(F.convolution_2d)
convolution_3d = _with_name(F.convolution_3d)
convolution_nd = _with_name(F.convolution_nd)
deconvolution_1d = _with_name(F.deconvolution_1d)
deconvolution_2d = _with_name(F.deconvolution_2d)
deconvolution_3d = _with_name(F.deconvolution_3d)
deconvolution_nd = _with_name(F.deconvolution_nd)
depthwise_convolution_2d = _with_name(F.depthwise_convolution_2d)
dilated_convolution_2d = _with_name(F.dilated_convolution_2d)
einsum = _with_name(F.einsum)
linear = _with_name(F.linear)
local_convolution_2d = _with_name(F.local_convolution_2d)
matmul = _with_name(F.matmul)
tensordot = _with_name(F.tensordot)
