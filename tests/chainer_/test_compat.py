"""The shims let the frozen Chainer and ChainerCV run on the Python and NumPy at hand."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from ada_loss.chainer import compat

EXTENSION = "chainercv.utils.bbox._nms_gpu_post"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def test_chainer_and_chainercv_import_in_a_fresh_interpreter_without_a_word(tmp_path: Path) -> None:
    code = "import ada_loss.chainer.compat, chainer, chainercv; print(chainer.__version__)"
    with_nothing_compiled = [sys.executable, "-X", f"pycache_prefix={tmp_path}", "-c", code]
    done = subprocess.run(with_nothing_compiled, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "7.8.1", "")


def test_installing_twice_changes_nothing() -> None:
    def state() -> tuple[object, ...]:
        check = sys.modules["chainer._environment_check"]
        names = {name: id(vars(np)[name]) for name in ("sctypes", "float", "int", "bool")}
        return names, id(check), list(sys.meta_path), list(warnings.filters)

    with warnings.catch_warnings():
        compat.install()
        before = state()
        compat.install()
        assert state() == before


@pytest.mark.parametrize("name", ["sctypes", "float", "int", "bool"])
def test_numpy_name_that_exists_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setitem(vars(np), name, own)
    compat.install()
    assert vars(np)[name] is own


@pytest.mark.parametrize("name, kind", [("float", "f"), ("int", "i"), ("bool", "b")])
def test_numpy_name_that_is_missing_becomes_the_type_it_stood_for(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(np), name)
    compat.install()
    restored = vars(np)[name]
    monkeypatch.undo()
    assert np.dtype(restored).kind == kind


def test_scalar_types_are_listed_by_kind() -> None:
    table = vars(np)["sctypes"]
    for kind, codes in {"int": "bhil", "uint": "BHIL", "float": "efdg", "complex": "FDG"}.items():
        assert {np.dtype(code).type for code in codes} <= set(table[kind])


def test_environment_check_already_imported_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("chainer._environment_check")
    monkeypatch.setitem(sys.modules, own.__name__, own)
    compat.install()
    assert sys.modules[own.__name__] is own


def test_function_that_needs_the_scalar_types_backpropagates(rng: np.random.Generator) -> None:
    import chainer
    import chainer.functions as F

    x = chainer.Variable(rng.standard_normal(5).astype(np.float32))
    windows = F.as_strided(x, (4, 2), (1, 1))
    weight = rng.standard_normal((4, 2)).astype(np.float32)
    F.sum(windows * weight).backward()
    expected = np.zeros(5, np.float32)
    np.add.at(expected, np.arange(4)[:, None] + np.arange(2), weight)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6)


def test_function_that_needs_the_old_float_interpolates(rng: np.random.Generator) -> None:
    import chainer.functions as F

    x = rng.standard_normal((1, 1, 3, 4)).astype(np.float32)
    y = F.resize_images(x, (5, 7)).array
    np.testing.assert_array_equal(y[:, :, ::2, ::2], x)
    np.testing.assert_allclose(y[:, :, 1::2, ::2], (x[:, :, :-1] + x[:, :, 1:]) / 2, rtol=1e-5, atol=1e-6)


def overlap_bits(boxes: np.ndarray, threshold: float, word_size: int) -> tuple[np.ndarray, int]:
    """The mask as the GPU kernel lays it out, computed box by box."""
    n = len(boxes)
    words = -(-n // word_size)
    mask = np.zeros((n, words), dtype=np.uint64)
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes[i + 1 :], start=i + 1):
            side = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
            common = side.prod()
            if common >= threshold * ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common):
                mask[i, j // word_size] |= np.uint64(1 << j % word_size)
    return mask.reshape(-1), words


@pytest.mark.parametrize("n_bbox", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("word_size", [32, 64])
def test_suppression_keeps_what_chainercv_keeps_on_cpu(
    n_bbox: int, word_size: int, rng: np.random.Generator
) -> None:
    from chainercv.utils import non_maximum_suppression

    corner = rng.uniform(0, 10, (n_bbox, 2))
    boxes = np.hstack([corner, corner + rng.uniform(2, 8, (n_bbox, 2))]).astype(np.float32)
    mask, words = overlap_bits(boxes, 0.45, word_size)
    selection, n_selection = compat.nms_gpu_post(mask, n_bbox, word_size, words)
    assert selection.dtype == np.int32 and selection.shape == (n_bbox,)
    np.testing.assert_array_equal(selection[:n_selection], non_maximum_suppression(boxes, 0.45))


def test_suppression_extension_can_be_imported() -> None:
    assert callable(importlib.import_module(EXTENSION)._nms_gpu_post)


def test_real_suppression_extension_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import chainercv.utils.bbox as package

    (tmp_path / "_nms_gpu_post.py").write_text("_nms_gpu_post = 'real'\n")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    monkeypatch.setattr(package, "_nms_gpu_post", None)
    monkeypatch.delitem(sys.modules, EXTENSION)
    importlib.invalidate_caches()
    assert importlib.import_module(EXTENSION)._nms_gpu_post == "real"
