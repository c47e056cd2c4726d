"""Makes the frozen Chainer 7.8.1 and ChainerCV 0.13.1 importable on current Python and NumPy.

Importing this module is enough; it has to happen before the first `import chainer`. Every mend is applied
only where the original is missing, so a name, module or extension that is really there always wins, and
applying them again changes nothing.

| what Chainer expects            | gone since           | mend                                      |
| ------------------------------- | -------------------- | ----------------------------------------- |
| `numpy.sctypes`                 | NumPy 2.0            | the same table                            |
| `numpy.float`, `.int`, `.bool`  | NumPy 1.24           | the Python types that they stood for      |
| `numpy.distutils` (import-time  | Python 3.12, current | an environment check that checks nothing, |
| check, of macOS and of CuPy 7)  | setuptools           | which is all that it could say here       |
| the extension `_nms_gpu_post`   | does not compile     | the same function in NumPy                |
| of ChainerCV                    | since Python 3.11    |                                           |
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

import numpy as np

_ENVIRONMENT_CHECK = "chainer._environment_check"
_NMS_EXTENSION = "chainercv.utils.bbox._nms_gpu_post"

_SCALAR_TYPES: dict[str, list[type]] = {
    "int": [np.int8, np.int16, np.int32, np.int64],
    "uint": [np.uint8, np.uint16, np.uint32, np.uint64],
    "float": [np.float16, np.float32, np.float64, np.longdouble],
    "complex": [np.complex64, np.complex128, np.clongdouble],
    "others": [bool, object, bytes, str, np.void],
}
_REMOVED_NAMES: dict[str, object] = {"sctypes": _SCALAR_TYPES, "float": float, "int": int, "bool": bool}


def install() -> None:
    """Apply every mend that this interpreter still needs. Idempotent."""
    _restore_numpy_names()
    _replace_environment_check()
    _serve_missing_extension()
    _silence_warnings()


def nms_gpu_post(
    mask: np.ndarray, n_bbox: int, threads_per_block: int, col_blocks: int
) -> tuple[np.ndarray, int]:
    """Pick boxes greedily, best first, from the overlaps that ChainerCV's GPU kernel found.

    Args:
        mask: uint64, shape (n_bbox * col_blocks,). Bit b of word j in row i is set if box
            j * threads_per_block + b comes after box i and overlaps it too much to be kept beside it.
        n_bbox: number of boxes, sorted by falling score.
        threads_per_block: boxes per word of a row, at most 64.
        col_blocks: words per row.

    Returns:
        Indices of the kept boxes, int32 of shape (n_bbox,), zero behind the last one, and their number.
    """
    overlaps = mask.reshape(n_bbox, col_blocks)
    suppressed = np.zeros(col_blocks, dtype=np.uint64)
    selection = np.zeros(n_bbox, dtype=np.int32)
    n_selection = 0
    for i in range(n_bbox):
        word, bit = divmod(i, threads_per_block)
        if not int(suppressed[word]) >> bit & 1:
            selection[n_selection] = i
            n_selection += 1
            suppressed |= overlaps[i]
    return selection, n_selection


class _NmsFallback(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves `nms_gpu_post` as ChainerCV's extension; last on the path, so a compiled one is found first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == _NMS_EXTENSION else None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["_nms_gpu_post"] = nms_gpu_post


def _restore_numpy_names() -> None:
    # `vars` and not `hasattr`: NumPy 1.23 still answers for the old names, but with a warning on every use.
    for name, value in _REMOVED_NAMES.items():
        vars(np).setdefault(name, value)


def _replace_environment_check() -> None:
    if _ENVIRONMENT_CHECK in sys.modules:
        return
    module = types.ModuleType(_ENVIRONMENT_CHECK, "Stands in for a check that needs numpy.distutils.")
    vars(module)["check"] = lambda: None
    sys.modules[_ENVIRONMENT_CHECK] = module


def _serve_missing_extension() -> None:
    if not any(isinstance(finder, _NmsFallback) for finder in sys.meta_path):
        sys.meta_path.append(_NmsFallback())


def _silence_warnings() -> None:
    # ChainerCV asks pkg_resources for its own version, and its docstrings have stray backslashes, which
    # Python 3.12 and later report where no compiled file exists yet. No user can do anything about either.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    warnings.filterwarnings("ignore", "", SyntaxWarning, r".*[/\\]chainercv[/\\]")


install()
