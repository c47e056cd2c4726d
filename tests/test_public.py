"""What is public: the names in `__all__`, documented, and nothing else in the front ends' packages."""

from __future__ import annotations

import importlib
import inspect

import pytest

import ada_loss.chainer  # noqa: F401  (before anything imports Chainer)

PUBLIC = {
    "ada_loss": ["__version__", "check"],
    "ada_loss.chainer": [
        "AdaLossBranch",
        "AdaLossConfig",
        "AdaLossConvolution2D",
        "AdaLossDeconvolution2D",
        "AdaLossLinear",
        "AdaLossScaled",
        "Diverged",
        "extensions",
        "functions",
        "kernels",
        "linear_backward",
        "links",
        "prepare",
        "record",
    ],
    "ada_loss.chainer.kernels": ["PROVIDERS", "current", "use", "using"],
    "ada_loss.torch": [
        "AdaLossConfig",
        "GradScaler",
        "ScaledTensor",
        "backend",
        "backward",
        "float32_kernels",
        "linear_backward",
        "record",
    ],
}


def module_of(name: str):
    if name == "ada_loss.torch":
        pytest.importorskip("torch")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_package_exports_what_is_public(name: str) -> None:
    assert sorted(module_of(name).__all__) == sorted(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_there_and_documented(name: str) -> None:
    module = module_of(name)
    assert inspect.getdoc(module)
    for each in module.__all__:
        value = getattr(module, each)
        if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), each
