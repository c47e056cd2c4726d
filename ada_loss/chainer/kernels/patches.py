"""Patches of padded images as float32 matrices (im2col), a cache-sized part at a time.

A patch is what one output position of a convolution sees. With stride 1 the images are laid out so that
*one* gap of zeros serves as the padding at the end of a row and at the start of the next: then moving a tap
of the kernel by one is moving along memory by one, and every tap's row of the matrix is one long copy. The
price is some positions inside the gaps, whose results are left out. Other strides copy row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ada_loss.arrays.casting import to_float32

PART_ELEMENTS = 1 << 20
"""Aimed-at size of a part's matrix."""

_LEAST_POSITIONS = 512
"""A part has about as many positions at least: with fewer the product is not worth the calls around it."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution's kernel walks over its input; pairs are (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """Weights of the kernel per pair of channels."""
        return self.kernel[0] * self.kernel[1]

    @property
    def reach(self) -> tuple[int, int]:
        """Distance between the kernel's first and last tap."""
        return (self.kernel[0] - 1) * self.dilation[0], (self.kernel[1] - 1) * self.dilation[1]

    @property
    def is_dense(self) -> bool:
        """Whether it visits every position, and no patch lies wholly inside the padding."""
        return self.stride == (1, 1) and all(
            p <= reach for p, reach in zip(self.pad, self.reach, strict=True)
        )

    def extent(self, out_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the padded input that `out_size` positions see."""
        height, width = (
            (n - 1) * s + reach + 1 for n, s, reach in zip(out_size, self.stride, self.reach, strict=True)
        )
        return height, width


@dataclass(frozen=True)
class Part:
    """Patches of some images and some rows of the output, as the columns of a matrix.

    columns: float32, (groups, channels per group * taps, positions); valid until the next part is made.
    """

    images: slice
    rows: slice
    columns: np.ndarray
    _grid: tuple[int, int, int]
    """Images, rows and columns of the positions, gaps included."""
    _width: int

    def cut(self, results: np.ndarray) -> np.ndarray:
        """The view (images, channels, rows, width), without gaps, of results (channels, positions)."""
        grid = results.reshape(-1, *self._grid)
        return grid[:, :, : self.rows.stop - self.rows.start, : self._width].transpose(1, 0, 2, 3)

    def embed(self, values: np.ndarray) -> np.ndarray:
        """The float32 matrix (channels, positions), zero in the gaps, of the values of this part in an array
        (all images, channels, all rows, width), float16 or float32."""
        part = values[self.images, :, self.rows]
        embedded = np.zeros((part.shape[1], math.prod(self._grid)), np.float32)
        copy_to_float32(part, self.cut(embedded))
        return embedded


class Patches:
    """The patches of a batch of images under a convolution with `out_size` output positions.

    Args:
        x: float16 or float32, (images, channels, height, width).
        geometry: the convolution's.
        out_size: (height, width) of its output.
    """

    def __init__(self, x: np.ndarray, geometry: Geometry, out_size: tuple[int, int]) -> None:
        self._x, self._geometry, self._out_size = x, geometry, out_size
        n_images, channels, height, width = x.shape
        (kh, kw), (sy, sx), (ph, pw) = geometry.kernel, geometry.stride, geometry.pad
        (dy, dx), (reach_y, reach_x) = geometry.dilation, geometry.reach

        # Every image lies in a slot of the plane. Dense positions are all of a slot, so that a tap's row of
        # the matrix is one piece of memory; the last slot's taps hang over its end.
        dense = geometry.is_dense
        rows, pitch = slot = (height + ph, width + pw) if dense else geometry.extent(out_size)
        self._grid = slot if dense else out_size
        per_row = channels * geometry.taps * self._grid[1]
        self._images_at_once = max(1, min(n_images, PART_ELEMENTS // (per_row * self._grid[0])))
        self._rows_at_once = max(PART_ELEMENTS // per_row, -(-_LEAST_POSITIONS // self._grid[1]))

        n = self._images_at_once
        overhang = reach_y * pitch + reach_x if dense else 0
        plane = np.zeros((channels, n * rows * pitch + overhang), np.float32)
        channel, item = plane.strides
        image, row = rows * pitch * item, pitch * item
        seen = (height, width) if dense else (min(height, max(rows - ph, 0)), min(width, max(pitch - pw, 0)))
        self._plane = plane
        self._inside = as_strided(
            plane[:, ph * pitch + pw :], (channels, n, *seen), (channel, image, row, item)
        )
        self._patches = as_strided(
            plane,
            (channels, kh, kw, n, *self._grid),
            (channel, dy * row, dx * item, image, sy * row, sx * item),
        )
        self._matrix = np.empty(0, np.float32)

    def __iter__(self) -> Iterator[Part]:
        """The parts, which together make up the batch."""
        n_images, height = len(self._x), self._out_size[0]
        for first in range(0, n_images, self._images_at_once):
            images = slice(first, min(first + self._images_at_once, n_images))
            n = images.stop - first
            self._load(self._x[images])
            if n > 1 or self._grid[0] <= self._rows_at_once:
                yield self._part(images, slice(0, height), self._grid[0])
                continue
            for row in range(0, height, self._rows_at_once):
                rows = slice(row, min(row + self._rows_at_once, height))
                yield self._part(images, rows, rows.stop - row)

    def _load(self, images: np.ndarray) -> None:
        inside = self._inside[:, : len(images)]
        height, width = inside.shape[2:]
        copy_to_float32(images[:, :, :height, :width].transpose(1, 0, 2, 3), inside)

    def _part(self, images: slice, rows: slice, grid_rows: int) -> Part:
        grid = images.stop - images.start, grid_rows, self._grid[1]
        columns = self._columns(grid, rows.start).reshape(self._geometry.groups, -1, math.prod(grid))
        return Part(images, rows, columns, grid, self._out_size[1])

    def _columns(self, grid: tuple[int, int, int], row: int) -> np.ndarray:
        n, rows, pitch = grid
        if self._geometry.taps == 1 and self._geometry.is_dense:
            return self._plane[:, row * pitch : row * pitch + math.prod(grid)]
        patches = self._patches[:, :, :, :n, row : row + rows]
        if self._matrix.size < patches.size:
            self._matrix = np.empty(patches.size, np.float32)
        columns = self._matrix[: patches.size].reshape(patches.shape)
        np.copyto(columns, patches)
        return columns


def copy_to_float32(source: np.ndarray, out: np.ndarray) -> None:
    """Copy float16 or float32 values into the float32 array `out` of the same shape."""
    if source.dtype == np.float16:
        to_float32(source, out)
    else:
        np.copyto(out, source)
