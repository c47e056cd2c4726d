"""The figures of an array on a GPU, from kernels that read it once.

Every block adds up its share in double precision, then one block adds up the blocks: no atomics, so the same
array always gives the same figures, and nothing here waits for the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

THREADS = 256
"""Threads in a block, a power of two."""

SHARE = 1 << 14
"""Elements for which one block is enough: below, a second block would not pay for a second kernel."""

MOST_BLOCKS = 1024
"""As many as the largest GPUs run at a time."""

FIGURES = 6
"""Nonzero elements; sum of squares; largest magnitude, infinite where an element is not finite; smallest
nonzero magnitude, infinite where there is none; sums of ln|x| and its square over the nonzero elements."""

NAMES = [f"summarize_{dtype}{logs}" for dtype in ("float16", "float32", "float64") for logs in ("", "_logs")]
"""The kernels that read arrays, by dtype and whether they add up logarithms (which are 0 otherwise)."""

MERGE = "merge_figures"

SOURCE = (
    f"""
const int THREADS = {THREADS};
"""
    r"""
struct Figures {
    double nonzero, sum_squares, largest, smallest, sum_logs, sum_squared_logs;
};

union Bits32 { unsigned int bits; float value; };
union Bits64 { unsigned long long bits; double value; };

__device__ inline float infinity(float) { Bits32 x; x.bits = 0x7f800000u; return x.value; }
__device__ inline double infinity(double) { Bits64 x; x.bits = 0x7ff0000000000000ull; return x.value; }

// Magnitudes; infinity also for what is not a number.
__device__ inline float magnitude(float x) { return x == x ? fabsf(x) : infinity(x); }
__device__ inline double magnitude(double x) { return x == x ? fabs(x) : infinity(x); }

// By hand from the bits of a float16, so that no header is needed.
__device__ inline float magnitude(unsigned short half) {
    const unsigned int bits = half & 0x7fffu;
    if (bits >= 0x7c00u) return infinity(0.0f);
    if (bits < 0x0400u) return bits * 5.9604644775390625e-8f;  // 2^-24
    Bits32 x;
    x.bits = (bits << 13) + (112u << 23);
    return x.value;
}

__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

__device__ inline Figures nothing() {
    Figures figures = {0, 0, 0, infinity(0.0), 0, 0};
    return figures;
}

__device__ inline void merge(Figures &into, const Figures &other) {
    into.nonzero += other.nonzero;
    into.sum_squares += other.sum_squares;
    into.largest = other.largest > into.largest ? other.largest : into.largest;
    into.smallest = other.smallest < into.smallest ? other.smallest : into.smallest;
    into.sum_logs += other.sum_logs;
    into.sum_squared_logs += other.sum_squared_logs;
}

// `Square` is the type that holds squares and a few of them added up.
template <typename Square, bool LOGS, int COUNT, typename Element>
__device__ inline void add(Figures &figures, const Element *elements) {
    typedef decltype(magnitude(Element())) Magnitude;
    int nonzero = 0;
    Square sum_squares = 0;
    Magnitude largest = 0, smallest = infinity(Magnitude());
    for (int i = 0; i < COUNT; ++i) {
        const Magnitude x = magnitude(elements[i]);
        sum_squares += (Square)x * (Square)x;
        largest = x > largest ? x : largest;
        if (x > 0) {
            ++nonzero;
            smallest = x < smallest ? x : smallest;
            if (LOGS) {
                const double l = logarithm(x);
                figures.sum_logs += l;
                figures.sum_squared_logs += l * l;
            }
        }
    }
    const Figures group = {(double)nonzero, (double)sum_squares, (double)largest, (double)smallest, 0, 0};
    merge(figures, group);
}

// What the threads of a block have found, merged pairwise.
__device__ inline void merge_block(const Figures &mine, Figures *out) {
    __shared__ Figures all[THREADS];
    all[threadIdx.x] = mine;
    for (unsigned int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) merge(all[threadIdx.x], all[threadIdx.x + half]);
    }
    if (threadIdx.x == 0) *out = all[0];
}

// Reads 16 bytes at a time where the address allows it.
template <typename Square, bool LOGS, typename Element>
__device__ inline void summarize(const Element *x, long long size, Figures *parts) {
    const int COUNT = 16 / sizeof(Element);
    struct alignas(16) Group { Element elements[COUNT]; };
    const long long first = (long long)blockIdx.x * THREADS + threadIdx.x;
    const long long step = (long long)gridDim.x * THREADS;
    const long long groups = (unsigned long long)x % 16 ? 0 : size / COUNT;
    Figures mine = nothing();
    for (long long i = first; i < groups; i += step) {
        const Group group = reinterpret_cast<const Group *>(x)[i];
        add<Square, LOGS, COUNT>(mine, group.elements);
    }
    for (long long i = groups * COUNT + first; i < size; i += step) add<Square, LOGS, 1>(mine, x + i);
    merge_block(mine, parts + blockIdx.x);
}

#define KERNELS(name, Element, Square)                                                          \
    extern "C" __global__ void name(const Element *x, long long size, Figures *parts) {         \
        summarize<Square, false>(x, size, parts);                                               \
    }                                                                                           \
    extern "C" __global__ void name##_logs(const Element *x, long long size, Figures *parts) {  \
        summarize<Square, true>(x, size, parts);                                                \
    }

KERNELS(summarize_float16, unsigned short, float)
KERNELS(summarize_float32, float, double)
KERNELS(summarize_float64, double, double)

extern "C" __global__ void merge_figures(const Figures *parts, long long count, Figures *whole) {
    Figures mine = nothing();
    for (long long i = threadIdx.x; i < count; i += THREADS) merge(mine, parts[i]);
    merge_block(mine, whole);
}
"""
)


def figures(xp: Any, array: Any, logs: bool) -> Any:
    """The FIGURES of an array on its device, a vector of float64.

    xp: the array's module, CuPy.
    array: of float16, float32 or float64, any shape and layout, not empty.
    """
    if not array.flags.forc:
        array = xp.ascontiguousarray(array)
    blocks = min(-(-array.size // SHARE), MOST_BLOCKS)
    parts = xp.empty((blocks, FIGURES), np.float64)
    kernel = _kernel(f"summarize_{array.dtype.name}{'_logs' if logs else ''}")
    kernel((blocks,), (THREADS,), (array, np.int64(array.size), parts))
    if blocks == 1:
        return parts[0]
    whole = xp.empty(FIGURES, np.float64)
    _kernel(MERGE)((1,), (THREADS,), (parts, np.int64(blocks), whole))
    return whole


@functools.cache
def _kernel(name: str) -> Any:
    return _module().get_function(name)


@functools.cache
def _module() -> Any:
    import cupy

    return cupy.RawModule(code=SOURCE)
