"""Casts between float16 and float32 NumPy arrays, as exact as NumPy's own and several times faster.

NumPy casts float16 one element at a time, in software on most builds, and takes far longer still where the
float16 is subnormal, which is what gradients are. Here both directions are a few vectorized passes over
chunks that stay in the cache: a look-up to float32, integer and float32 arithmetic back to float16.

Every finite value, infinity and signed zero comes out as NumPy's cast has it: rounded to nearest, ties to
even, subnormals kept, overflow to infinity (without a warning). A NaN stays a NaN.

Something faster still can be put before them (`prefer`). It has to give the same bits, so that it makes no
difference to results who casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

CHUNK = 1 << 16
"""Elements cast at a time: the scratch fits a core's second-level cache, and the calls hardly count."""

_NATIVE = 1 << 10
"""Up to this many elements NumPy's own casts are quicker than the calls around anything else."""

Copy = Callable[[np.ndarray, np.ndarray], bool]
"""Casts its first array into its second, as `to_float32` and `to_float16` do. False: not these two."""

with np.errstate(invalid="ignore"):
    _FLOAT32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
_FLOAT32.flags.writeable = False

# The upper half of a float32: a sign, eight bits of exponent (bias 127), seven of mantissa. Arrays without
# dimensions, because NumPy spends as long on a scalar operand as on thousands of elements.
_HALF = np.array(16, np.int32)
_SIGN = np.array(-0x8000, np.int16)
_EXPONENT = np.array(0x7F80, np.int16)
_EXPONENT_OF_MAGIC = np.array(13 << 7, np.int16)
_TO_FLOAT16_EXPONENT = np.array(3, np.int16)
_BIAS = np.array(2 << 10, np.int16)
_TOO_LARGE = 143 << 7
"""Exponent of 2**16, from which on a float32 has no finite neighbour in float16."""
_TO_FLOAT32 = np.array(13, np.uint32)
_FROM_SMALL = np.array(2.0**112, np.float32)
_SMALLEST_NORMAL = np.full(CHUNK, 113 << 7, np.int16)
"""Exponent of 2**-14, once per element: NumPy's maximum is vectorized for arrays only."""


_preferred: Callable[[], Copy | None] | None = None


def prefer(preferred: Callable[[], Copy | None]) -> None:
    """Ask `preferred` before every cast of more than a few elements who does it; None: the passes here."""
    global _preferred
    _preferred = preferred


def to_float32(source: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The float16 array `source` in float32, in a new array that lies in memory as it does or in `out`.

    Both may be strided in any way; `out` has the shape of `source` and shares no memory with it.
    """
    out = _destination(source, np.float16, out, np.float32)
    if _is_cast(source, out):
        return out
    for values, target in chunks(source, out):
        bits = values.view(np.uint16)
        if target.flags.c_contiguous:
            _FLOAT32.take(bits, out=target, mode="clip")
        else:
            target[...] = _FLOAT32.take(bits, mode="clip")
    return out


def magnitudes_to_float32(bits: np.ndarray) -> np.ndarray:
    """The finite float16 of these bits, an array of uint16 without signs, in float32."""
    out = np.empty(bits.shape, np.float32)
    if not _is_cast(bits.view(np.float16), out):
        # Shifted into place, exponent and mantissa of a float16 are those of a float32 2**112 times as small.
        wide = out.view(np.uint32)
        wide[...] = bits
        wide <<= _TO_FLOAT32
        out *= _FROM_SMALL
    return out


def to_float16(source: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 array `source` rounded to float16, in a new array that lies in memory as it does or in
    `out`.

    Both may be strided in any way; `out` has the shape of `source` and shares no memory with it.
    """
    out = _destination(source, np.float32, out, np.float16)
    if _is_cast(source, out):
        return out
    rounding = _Rounding(min(source.size, CHUNK))
    for values, target in chunks(source, out):
        rounding.apply(values, target)
    return out


class _Rounding:
    """Rounds float32 to float16 by adding a power of two so large that float32 itself must round the sum.

    For 2**e <= |x| < 2**(e+1) that power is 2**(e+13): the sum's last bit is worth 2**(e-10), as is that of
    a float16 near x, so the processor rounds x to nearest even where float16 does. The lowest bits of the
    sum are then the mantissa, hidden bit included, and adding the exponent to them makes the float16, a
    carry into the next exponent included. Holding e at -14 or more does the same for subnormals.
    """

    def __init__(self, size: int) -> None:
        self._wide = np.empty(size, np.int32)
        self._sign = np.empty(size, np.int16)
        self._exponent = np.empty(size, np.int16)
        self._staged = np.empty(0, np.float32)

    def apply(self, values: np.ndarray, target: np.ndarray) -> None:
        """Round the float32 `values` into the float16 `target`, at most `size` elements."""
        flat = values.reshape(-1) if values.flags.c_contiguous else self._stage(values)
        wide, sign, exponent = (a[: flat.size] for a in (self._wide, self._sign, self._exponent))
        np.right_shift(flat.view(np.int32), _HALF, wide)
        sign[...] = wide
        np.bitwise_and(sign, _EXPONENT, exponent)
        if np.maximum.reduce(exponent) >= _TOO_LARGE:
            _cast_natively(values, target)
            return
        np.bitwise_and(sign, _SIGN, sign)
        np.maximum(exponent, _SMALLEST_NORMAL[: flat.size], out=exponent)
        np.add(exponent, _EXPONENT_OF_MAGIC, exponent)
        np.bitwise_or(exponent, sign, exponent)
        wide[...] = exponent
        np.left_shift(wide, _HALF, wide)
        magic = wide.view(np.float32)
        np.add(magic, flat, magic)
        # From here on arithmetic modulo 2**16: the superfluous bits of the exponent fall off the top.
        np.left_shift(exponent, _TO_FLOAT16_EXPONENT, exponent)
        np.add(exponent, _BIAS, exponent)
        np.bitwise_or(sign, exponent, sign)
        exponent[...] = wide
        if target.flags.c_contiguous:
            np.add(sign, exponent, target.reshape(-1).view(np.int16))
        else:
            np.add(sign, exponent, sign)
            target.view(np.int16)[...] = sign.reshape(target.shape)

    def _stage(self, values: np.ndarray) -> np.ndarray:
        if not self._staged.size:
            self._staged = np.empty(self._wide.size, np.float32)
        staged = self._staged[: values.size]
        staged.reshape(values.shape)[...] = values
        return staged


def cast(array: Any, dtype: Any) -> Any:
    """`array.astype(dtype, copy=False)` of any array, by the fast ways where there is one."""
    dtype = np.dtype(dtype)
    if isinstance(array, np.ndarray) and array.ndim:
        if array.dtype == np.float16 and dtype == np.float32:
            return to_float32(array)
        if array.dtype == np.float32 and dtype == np.float16:
            return to_float16(array)
    return array.astype(dtype, copy=False)


def _is_cast(source: np.ndarray, out: np.ndarray) -> bool:
    """Cast where there is something quicker than the passes; whether there was."""
    if source.size <= _NATIVE:
        if out.dtype == np.float16:
            _cast_natively(source, out)
        else:
            np.copyto(out, source)
        return True
    copy = _preferred and _preferred()
    return copy is not None and copy(source, out)


def _cast_natively(source: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.copyto(out, source, casting="same_kind")


def _destination(
    source: np.ndarray, expected: type[np.generic], out: np.ndarray | None, dtype: type[np.generic]
) -> np.ndarray:
    if source.dtype != expected:
        raise TypeError(f"expected an array of {np.dtype(expected)}, got {source.dtype}")
    if out is None:
        return np.empty_like(source, dtype)
    if out.dtype != dtype or out.shape != source.shape:
        raise TypeError(
            f"expected out to be {np.dtype(dtype)} of shape {source.shape}, got {out.dtype} {out.shape}"
        )
    return out


def memory_order(array: Any) -> tuple[int, ...]:
    """An array's axes by their strides, the largest first: transposed so, an array without gaps is
    C-contiguous."""
    return tuple(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))


def empty_in_order(shape: tuple[int, ...], dtype: Any, axes: tuple[int, ...]) -> np.ndarray:
    """A new array whose `memory_order` this is."""
    return np.empty([shape[axis] for axis in axes], dtype).transpose(inverse(axes))


def inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    """What undoes a transposition."""
    return tuple(map(axes.index, range(len(axes))))


def chunks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Matching parts, of at most CHUNK elements each, of arrays of one shape, however they are strided."""
    first, axes = arrays[0], memory_order(arrays[0])
    if first.size <= CHUNK:
        if first.size:
            yield arrays
    elif first.ndim > 1 and all(a.transpose(axes).flags.c_contiguous for a in arrays):
        yield from chunks(*(a.transpose(axes).reshape(-1) for a in arrays))
    elif rows := CHUNK * len(first) // first.size:
        for start in range(0, len(first), rows):
            yield tuple(a[start : start + rows] for a in arrays)
    else:
        for parts in zip(*arrays, strict=True):
            yield from chunks(*parts)
