"""Pillow's bilinear resize and colour matrix, to the bit, compiled for this processor. Only `resize` uses it.

One call for a share of a batch needs no interpreter, computes only the crops, mirrors on the way, and writes
into the batch. Scalar loops on purpose: Numba compiles them; array expressions would allocate. `blend` of
`resize_lanes` does most of the work.

Pixels are flat arrays here. An image is the place where it starts, and the bytes from a row to the next. In
arrays of the caller, nothing outside the window is read, and nothing outside the crop written.

Source: Pillow 13, src/libImaging/Resample.c and Matrix.c.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np

from data_pipeline.common.files import hash_of
from data_pipeline.decode import resize_lanes
from data_pipeline.decode.resize_lanes import BITS, HALF, LANES, ROWS, blend, load_pixel, recolor

log = logging.getLogger("data_pipeline")

Function = TypeVar("Function", bound=Callable[..., object])
_numba: Any = numba
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def compile_crop_batch() -> Any:
    """Compile `crop_batch`, or load what an earlier process compiled: seconds the first time, then 0.2 s.

    Returns:
        See `_make_crop_batch`. Its pixels may be read-only; pixels and images are contiguous.
    Raises:
        Exception: Numba cannot compile it, for any reason.
    """
    if _numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    t = _numba.types
    signature = t.void(
        t.Array(t.uint8, 4, "C", readonly=True),
        t.int64[:],
        t.int64[:, :],
        t.int64[:, :],
        t.int64[:, :, :],
        t.boolean[:, :],
        t.float32[:, :, :],
        t.uint8[:, :, :, :, ::1],
        t.int64,
        t.int64,
    )
    started = time.perf_counter()
    # Numba's cache knows when this file has changed, not when the other has
    crop_batch = _make_crop_batch(int(hash_of(Path(resize_lanes.__file__), "sha256")[:15], 16))
    try:
        compiled = _numba.njit(signature, cache=True, **_OPTIONS)(crop_batch)
    except Exception as error:  # no folder to write to, a full disk, a damaged entry: by kind of fault
        log.info("Numba's cache cannot be used (%s): compiling without", error)
        compiled = _numba.njit(signature, **_OPTIONS)(crop_batch)
    if not compiled.stats.cache_hits:
        log.info("compiled the resize for this processor in %.1f s", time.perf_counter() - started)
    return compiled


def _inlined(function: Function) -> Function:
    """Compile a function as part of its callers."""
    compiled: Function = _numba.njit(**_OPTIONS)(function)
    return compiled


@_inlined
def _weigh(size_in: int, size_out: int, first: int, count: int, mirrored: bool) -> Any:
    """Compute which input pixels make an output pixel, and the weight of each.

    Args:
        size_in: pixels along the axis.
        size_out: pixels after resizing.
        first: first output pixel that is wanted.
        count: how many are.
        mirrored: whether the last comes first.
    Returns:
        (count) the first input pixel of each; (count, taps) weights, in units of 2**-22. All have as many
        taps, since a processor predicts a loop of constant length; those that Pillow does not have weigh 0.
    """
    scale = float(np.float32(size_in)) / size_out
    support = max(scale, 1.0)
    narrow = 1.0 / support
    lows, highs = np.empty(count, np.int64), np.empty(count, np.int64)
    taps = 1
    for i in range(count):
        center = (first + i + 0.5) * scale
        lows[i] = max(int(center - support + 0.5), 0)
        highs[i] = min(int(center + support + 0.5), size_in)
        taps = max(taps, highs[i] - lows[i])
    starts, weights = np.empty(count, np.int64), np.zeros((count, taps), np.int32)
    for i in range(count):
        center = (first + i + 0.5) * scale
        total = 0.0
        for pixel in range(lows[i], highs[i]):
            total += max(1.0 - abs((pixel - center + 0.5) * narrow), 0.0)
        low = min(lows[i], size_in - taps)
        to = count - 1 - i if mirrored else i
        for pixel in range(lows[i], highs[i]):
            weight = max(1.0 - abs((pixel - center + 0.5) * narrow), 0.0)
            if total != 0.0:
                weight /= total
            weights[to, pixel - low] = int(0.5 + weight * (1 << BITS))
        starts[to] = low
    return starts, weights


@_inlined
def _resize_rows(source: Any, start: int, step: int, size: Any, lows: Any, weights: Any, target: Any) -> None:
    """Resize each row of (height, width) pixels to `len(lows)`.

    `target` is scratch: its rows are a byte longer than their pixels, and a multiple of `ROWS`.
    """
    height, width = size
    count, taps = weights.shape
    length = count * 3 + 1
    weights = weights.reshape(-1)
    columns = np.empty(width * ROWS, np.uint32)  # the pixels of ROWS rows, those of a column side by side
    columns_bytes = columns.view(np.uint8)
    starts = np.empty(ROWS, np.int64)
    for top in range(0, height, ROWS):
        for row in range(ROWS):
            starts[row] = start + min(top + row, height - 1) * step
        for x in range(width - 1):
            for row in range(ROWS):
                columns[np.uint64(x * ROWS + row)] = load_pixel(source, starts[row] + x * 3)
        for row in range(ROWS):  # of the last pixel, a fourth byte might not be ours
            at = starts[row] + (width - 1) * 3
            blue = np.uint32(source[at + 2])
            columns[(width - 1) * ROWS + row] = source[at] | np.uint32(source[at + 1]) << 8 | blue << 16
        for x in range(count):  # from left to right: the fourth byte of a pixel is the first of the next
            low = lows[x] * LANES
            blend(columns_bytes, low, LANES, weights, x * taps, taps, target, top * length + x * 3, length)


@_inlined
def _resize_columns(
    source: Any, start: int, step: int, length: int, lows: Any, weights: Any, target: Any, to: int, by: int
) -> None:
    """Resize each of `length` columns of bytes to `len(lows)`, from `to` on in rows that are `by` apart."""
    count, taps = weights.shape
    flat = weights.reshape(-1)
    for y in range(count):
        top = start + lows[y] * step
        if length >= LANES:
            for x in range(0, length, LANES):
                at = min(x, length - LANES)  # the last ones overlap: what follows a row is not ours
                blend(source, top + at, step, flat, y * taps, taps, target, to + at, 4)
        else:
            for x in range(length):
                total = HALF
                for tap in range(taps):
                    total += source[top + tap * step + x] * weights[y, tap]
                target[to + x] = total >> BITS
        to += by


@_inlined
def _color(pixels: Any, start: int, count: int, matrix: Any) -> None:
    """Apply a (3, 4) float32 matrix to `count` pixels, in place."""
    step = 3 * LANES
    stop = start + count * 3
    numbers, rest = np.empty(12, np.float32), np.zeros(step, np.uint8)
    for i in range(12):
        numbers[i] = matrix[i // 4, i % 4]
    whole = stop - (stop - start) % step
    for at in range(start, whole, step):
        recolor(pixels, at, numbers)
    for at in range(whole, stop):
        rest[at - whole] = pixels[at]
    recolor(rest, 0, numbers)
    for at in range(whole, stop):
        pixels[at] = rest[at - whole]


@_inlined
def _resize(
    source: Any, start: int, step: int, size: Any, size_out: Any, cut: Any, flip: bool,
    target: Any, to: int, by: int,
) -> None:  # fmt: skip
    """Resize a window of (height, width) pixels; of the result, write the part `cut` from `to` on.

    Args:
        cut: top, left, height, width.
        flip: whether to mirror that part.
        by: bytes in the target from a row to the next.
    """
    height, width = size
    top, left, rows, columns = cut
    to_rows, row_weights = _weigh(height, size_out[0], top, rows, False)
    to_columns, column_weights = _weigh(width, size_out[1], left, columns, flip)
    fewer_rows, fewer_columns = height - size_out[0], width - size_out[1]
    length = columns * 3
    if fewer_rows > 0 and fewer_rows > 2 * fewer_columns:  # Pillow's choice; it rounds between the passes
        between = np.empty(rows * width * 3, np.uint8)
        _resize_columns(source, start, step, width * 3, to_rows, row_weights, between, 0, width * 3)
        padded = np.empty((rows + ROWS) * (length + 1), np.uint8)
        _resize_rows(between, 0, width * 3, (rows, width), to_columns, column_weights, padded)
        for y in range(rows):
            for x in range(length):
                target[to + y * by + x] = padded[y * (length + 1) + x]
    else:
        first, last = to_rows[0], to_rows[rows - 1] + row_weights.shape[1]
        padded = np.empty((last - first + ROWS) * (length + 1), np.uint8)
        start += first * step
        _resize_rows(source, start, step, (last - first, width), to_columns, column_weights, padded)
        start, step = -first * (length + 1), length + 1
        _resize_columns(padded, start, step, length, to_rows, row_weights, target, to, by)


@_inlined
def _around(tops_lefts: Any, side: int, size: Any) -> Any:
    """Top, left, height and width of what encloses V squares, as far as it is in (height, width)."""
    top, left = bottom, right = tops_lefts[0, 0], tops_lefts[0, 1]
    for view in range(1, len(tops_lefts)):
        top, left = min(top, tops_lefts[view, 0]), min(left, tops_lefts[view, 1])
        bottom, right = max(bottom, tops_lefts[view, 0]), max(right, tops_lefts[view, 1])
    top, left = max(top, 0), max(left, 0)
    return top, left, min(bottom + side, size[0]) - top, min(right + side, size[1]) - left


@_inlined
def _cut_views(region: Any, cut: Any, tops_lefts: Any, flips: Any, views: Any) -> None:
    """Copy parts of a resized window, of which `region` has the part `cut`, to (V, crop, crop, 3).

    What is in a view and not in the region is outside of the window, and black.
    """
    top, left, rows, columns = cut
    num_views, side = views.shape[:2]
    for view in range(num_views):
        above, before = tops_lefts[view, 0] - top, tops_lefts[view, 1] - left
        first, stop = max(-before, 0), min(columns - before, side)
        if stop - first < side or above < 0 or above + side > rows:
            views[view] = 0
        for y in range(max(-above, 0), min(rows - above, side)):
            at = ((above + y) * columns + before) * 3
            for x in range(first, stop):
                to = side - 1 - x if flips[view] else x
                for c in range(3):
                    views[view, y, to, c] = region[at + x * 3 + c]


def _make_crop_batch(version: int) -> Callable[..., None]:
    """Make the function to compile. Numba's cache keeps one for each `version`."""

    def crop_batch(
        pixels: Any, indices: Any, windows: Any, sizes: Any, offsets: Any, flips: Any, colors: Any,
        images: Any, first: int, stop: int,
    ) -> None:  # fmt: skip
        """Cut, resize, crop, mirror and colour images `first` to `stop` of a batch.

        A crop without padding is all of its image; one with padding leaves the rest of it black.

        Args:
            pixels: (M, height, width, 3) uint8.
            indices: (N) which of them each image is of; (0) if the whole of the only one is the window.
            windows, sizes: see `CropParams`.
            offsets: (N, V, 2).
            flips: (N, V).
            colors: see `CropParams`; (0, 3, 4) for None.
            images: (N, V, crop, crop, 3) uint8.
        """
        assert version >= 0  # a variable that is not used would not be part of it
        _, height, width, _ = pixels.shape
        num_views, side = images.shape[1:3]
        source, target, step = pixels.reshape(-1), images.reshape(-1), width * 3
        for i in range(first, stop):
            start, size = 0, (height, width)
            if len(indices):
                y, x, size = windows[i, 0], windows[i, 1], (windows[i, 2], windows[i, 3])
                start = ((indices[i] * height + y) * width + x) * 3
            size_out = (sizes[i, 0], sizes[i, 1])
            cut = _around(offsets[i], side, size_out)
            if num_views > 1:
                region = np.empty(cut[2] * cut[3] * 3, np.uint8)
                _resize(source, start, step, size, size_out, cut, False, region, 0, cut[3] * 3)
                _cut_views(region, cut, offsets[i], flips[i], images[i])
            else:
                if cut[2] < side or cut[3] < side:
                    images[i] = 0
                above, before = cut[0] - offsets[i, 0, 0], cut[1] - offsets[i, 0, 1]
                if flips[i, 0]:
                    before = side - before - cut[3]
                to = ((i * side + above) * side + before) * 3
                _resize(source, start, step, size, size_out, cut, flips[i, 0], target, to, side * 3)
            if len(colors):  # black, too
                num_pixels = num_views * side * side
                _color(target, i * num_pixels * 3, num_pixels, colors[i])

    return crop_batch
