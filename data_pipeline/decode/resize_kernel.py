"""Pillow's bilinear resize and colour matrix, to the bit, compiled for this processor. Only `resize` uses it.

One call an image needs no interpreter, computes only the crop, mirrors on the way, and writes into the batch:
a third of Pillow's time. Scalar loops on purpose: Numba compiles them; array expressions would allocate.

Legend: a row is (width * 3) of interleaved RGB. Indices are unsigned where Numba would else look for negative
ones; there are no bounds checks.

Source: Pillow 13, src/libImaging/Resample.c and Matrix.c.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

log = logging.getLogger("data_pipeline")

_BITS = 22  # of a weight, behind the point
_HALF = 1 << (_BITS - 1)
_HALVES = _HALF | _HALF << 32

Function = TypeVar("Function", bound=Callable[..., object])
_numba: Any = numba
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def compile_finish() -> Any:
    """Compile `_finish`, or load what an earlier process compiled: seconds the first time, then 0.2 s.

    Returns:
        `_finish`. Its window may be read-only; windows and images are contiguous.
    Raises:
        Exception: Numba cannot compile it, for any reason.
    """
    if _numba.config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set")
    t = _numba.types
    signature = t.void(
        t.Array(t.uint8, 3, "C", readonly=True),
        t.int64,
        t.int64[:, :],
        t.int64[:, :],
        t.boolean[:],
        t.float32[:, :, :],
        t.uint8[:, :, :, ::1],
    )
    started = time.perf_counter()
    try:
        compiled = _numba.njit(signature, cache=True, **_OPTIONS)(_finish)
    except Exception as error:  # no folder to write to, a full disk, a damaged entry: by kind of fault
        log.info("Numba's cache cannot be used (%s): compiling without", error)
        compiled = _numba.njit(signature, **_OPTIONS)(_finish)
    if not compiled.stats.cache_hits:
        log.info("compiled the resize for this processor in %.1f s", time.perf_counter() - started)
    return compiled


def _inlined(function: Function) -> Function:
    """Compile a function as part of its callers."""
    compiled: Function = _numba.njit(**_OPTIONS)(function)
    return compiled


@_inlined
def _weigh(size_in: int, size_out: int, first: int, count: int) -> Any:
    """Compute which input pixels make an output pixel, and the weight of each.

    Args:
        size_in: pixels along the axis.
        size_out: pixels after resizing.
        first: first output pixel that is wanted.
        count: how many are.
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
    weights = np.zeros((count, taps), np.int64)
    for i in range(count):
        center = (first + i + 0.5) * scale
        total = 0.0
        for pixel in range(lows[i], highs[i]):
            total += max(1.0 - abs((pixel - center + 0.5) * narrow), 0.0)
        low = min(lows[i], size_in - taps)
        for pixel in range(lows[i], highs[i]):
            weight = max(1.0 - abs((pixel - center + 0.5) * narrow), 0.0)
            if total != 0.0:
                weight /= total
            weights[i, pixel - low] = int(0.5 + weight * (1 << _BITS))
        lows[i] = low
    return lows, weights


@_inlined
def _resize_rows(source: Any, lows: Any, weights: Any, flip: bool, target: Any) -> None:
    """Resize each row: (rows, width * 3) to (rows, len(lows) * 3); mirrored if `flip`.

    Two rows at once, one in either half of 64 bits: no sum reaches the 32nd.
    """
    rows, length = source.shape
    count, taps = weights.shape
    pairs = np.empty(length, np.int64)
    three, green, blue = np.uint64(3), np.uint64(1), np.uint64(2)
    for upper in range(0, rows, 2):
        lower = min(upper + 1, rows - 1)
        above, below = source[upper], source[lower]
        for i in range(length):
            pairs[i] = np.int64(above[i]) | (np.int64(below[i]) << 32)
        above, below = target[upper], target[lower]
        for x in range(count):
            r = g = b = np.int64(_HALVES)
            at = np.uint64(lows[x]) * three
            for tap in range(taps):
                weight = weights[x, tap]
                r += pairs[at] * weight
                g += pairs[at + green] * weight
                b += pairs[at + blue] * weight
                at += three
            to = np.uint64(count - 1 - x if flip else x) * three
            above[to] = r >> _BITS  # the lowest 8 bits of it
            above[to + green] = g >> _BITS
            above[to + blue] = b >> _BITS
            below[to] = r >> (32 + _BITS)
            below[to + green] = g >> (32 + _BITS)
            below[to + blue] = b >> (32 + _BITS)


@_inlined
def _resize_columns(source: Any, lows: Any, weights: Any, target: Any) -> None:
    """Resize each column: (height, length) to (len(lows), length)."""
    count, taps = weights.shape
    length = source.shape[1]
    sums = np.empty(length, np.int32)
    for y in range(count):
        sums[:] = np.int32(_HALF)
        for tap in range(taps):
            weight = np.int32(weights[y, tap])
            row = source[lows[y] + tap]
            for i in range(length):
                sums[i] = np.int32(sums[i] + np.int32(row[i]) * weight)
        row = target[y]
        for i in range(length):
            row[i] = sums[i] >> _BITS


@_inlined
def _color(pixels: Any, matrix: Any) -> None:
    """Apply a (3, 4) float32 matrix to (pixels, 3) in place; sums in Pillow's order, and rounded as there."""
    count = len(pixels)
    red, green, blue = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(count):
        red[i], green[i], blue[i] = pixels[i, 0], pixels[i, 1], pixels[i, 2]
    half, lowest, highest = np.float32(0.5), np.float32(0), np.float32(255)
    values = np.empty(count, np.int32)
    for c in range(3):
        of_red, of_green, of_blue, offset = matrix[c, 0], matrix[c, 1], matrix[c, 2], matrix[c, 3]
        for i in range(count):
            value = of_red * red[i] + of_green * green[i] + of_blue * blue[i] + offset + half
            value = lowest if value < lowest else value
            value = highest if value > highest else value
            values[i] = np.int32(value)
        for i in range(count):
            pixels[i, c] = values[i]


def _finish(window: Any, index: int, sizes: Any, offsets: Any, flips: Any, colors: Any, images: Any) -> None:
    """Resize a window, crop, mirror and colour it.

    Args:
        window: (height, width, 3) uint8.
        index: which image of the batch.
        sizes, offsets, flips: see `CropParams`; one view of each image.
        colors: see `CropParams`; (0, 3, 4) for None.
        images: (N, crop, crop, 3) uint8; `index` is written.
    """
    height, width, _ = window.shape
    side = images.shape[1]
    fewer_rows, fewer_columns = height - sizes[index, 0], width - sizes[index, 1]
    to_rows, row_weights = _weigh(height, sizes[index, 0], offsets[index, 0], side)
    to_columns, column_weights = _weigh(width, sizes[index, 1], offsets[index, 1], side)
    source = window.reshape(height, width * 3)
    target = images[index].reshape(side, side * 3)
    if fewer_rows > 0 and fewer_rows > 2 * fewer_columns:  # Pillow's choice; it rounds between the passes
        between = np.empty((side, width * 3), np.uint8)
        _resize_columns(source, to_rows, row_weights, between)
        _resize_rows(between, to_columns, column_weights, flips[index], target)
    else:
        first, last = to_rows[0], to_rows[-1] + row_weights.shape[1]
        between = np.empty((last - first, side * 3), np.uint8)
        _resize_rows(source[first:last], to_columns, column_weights, flips[index], between)
        _resize_columns(between, to_rows - first, row_weights, target)
    if len(colors):
        _color(images[index].reshape(side * side, 3), colors[index])
