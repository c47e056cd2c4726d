"""Sentences for scripts in which a part of mixed precision is missing."""

from __future__ import annotations

from chainer.utils.type_check import InvalidType

HOW_TO_USE_FLOAT16 = (
    "put chainer.global_config.dtype = chainer.mixed16 before the model is made, and give it float16 inputs"
)


def explain(error: InvalidType) -> None:
    """Where float16 has met a wider format, raise what Chainer says of it in one sentence."""
    types = f"{error.expect} {error.actual}"
    if "float16" not in types or "float32" not in types and "float64" not in types:
        return
    where = str(error).split("performed in: ")[-1].split(" (Forward)")[0]
    raise TypeError(
        f"{where} is given float16 and a wider format at once, which Chainer does not mix: cast what is "
        "wider, as in F.cast(x, np.float16), or give the model float16 inputs, as in x.astype(np.float16)."
    ) from error
