"""What Chainer says where float16 meets a wider format, in one sentence."""

from __future__ import annotations

from chainer.utils.type_check import InvalidType

_MIXED = (
    "{where} is given float16 and a wider format at once, which Chainer does not mix: cast what is wider, as "
    "in F.cast(x, np.float16), or give the model float16 inputs, as in x.astype(np.float16)."
)


def explain(error: InvalidType) -> None:
    """Where float16 has met a wider format, raise what Chainer says of it in one sentence."""
    types = f"{error.expect} {error.actual}"
    if "float16" in types and ("float32" in types or "float64" in types):
        where = str(error).split("performed in: ")[-1].split(" (Forward)")[0]
        raise TypeError(_MIXED.format(where=where)) from error
