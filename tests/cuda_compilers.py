"""Two ways to test CUDA kernels without a GPU: NVIDIA's compiler, and a C++ one with threads for theirs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_ON_HOST = r"""
#include <cmath>
#include <pthread.h>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
struct Index { unsigned int x; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static pthread_barrier_t barrier;
static void __syncthreads() { pthread_barrier_wait(&barrier); }
"""

_LAUNCH = r"""
typedef void (*Kernel)(const void *, long long, void *);
extern "C" void launch(Kernel kernel, int blocks, int threads, const void *in, long long size, void *out) {
    gridDim.x = blocks;
    pthread_barrier_init(&barrier, nullptr, threads);
    for (int block = 0; block < blocks; ++block) {
        std::vector<std::thread> all;
        for (int thread = 0; thread < threads; ++thread)
            all.emplace_back([=] { blockIdx.x = block; threadIdx.x = thread; kernel(in, size, out); });
        for (auto &each : all) each.join();
    }
    pthread_barrier_destroy(&barrier);
}
"""

Kernel = Callable[[tuple[int], tuple[int], tuple[Any, ...]], None]


def on_host(source: str, folder: Path) -> Callable[[str], Kernel]:
    """The kernels of a CUDA source by name, to be called as CuPy's with NumPy arrays.

    They take an array, an integer and an array to write to. Every thread of a block is a thread of its own;
    the blocks run one after the other. Skips the test where there is no C++ compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("There is no C++ compiler.")
    path, library = folder / "kernels.cpp", folder / "kernels.so"
    path.write_text(_ON_HOST + source + _LAUNCH)
    flags = ["-std=c++11", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread"]
    subprocess.run([compiler, *flags, str(path), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def kernel_of(name: str) -> Kernel:
        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            source, size, target = arguments
            addresses = [ctypes.c_void_p(array.ctypes.data) for array in (source, target)]
            size = ctypes.c_longlong(size)
            loaded.launch(getattr(loaded, name), grid[0], block[0], addresses[0], size, addresses[1])

        return launch

    return kernel_of


def compiled(source: str, architecture: str) -> bytes:
    """The machine code that NVIDIA's compiler makes of a CUDA source for an architecture such as "sm_90".

    Fails the test with the compiler's messages where there are any; skips it where the compiler is missing.
    """
    nvrtc = _compiler()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}".encode()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    messages = _text(nvrtc, "ProgramLog", program).decode().strip("\0\n")
    assert (status, messages) == (0, "")
    return _text(nvrtc, "CUBIN", program)


def _compiler() -> ctypes.CDLL:
    spec = find_spec("nvidia.cuda_nvrtc") if find_spec("nvidia") else None
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("lib/libnvrtc.so.*")]
    if not paths:
        pytest.skip("NVIDIA's compiler, nvidia-cuda-nvrtc-cu12, is not installed.")
    return ctypes.CDLL(str(paths[0]))


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = np.empty(size.value, np.uint8)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, ctypes.c_void_p(buffer.ctypes.data)) == 0
    return buffer.tobytes()
