"""Operations on 16 bytes or pixels at once, in LLVM's form. Only `resize_kernel` uses them.

In loops over pixels of three bytes no compiler finds 16 equal operations, and Numba makes 64 bits of every
product. LLVM makes of these what the processor has: one AVX-512 instruction, two of AVX2, four of NEON.

Numba's compiler runs these functions, once for each call in the kernel's source; they emit the code for it.
Arrays are flat; places in them, such as `at`, are counted in elements. Nothing checks bounds.

Source: Pillow 13, src/libImaging/Resample.c and Matrix.c, for what is rounded where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numba.extending
from llvmlite import ir

LANES = 16
ROWS = 4
"""Rows of pixels in LANES bytes: one pixel of each, in four bytes, the last of which is not used."""
BITS = 22
"""Of a weight, behind the point."""
HALF = 1 << (BITS - 1)

_numba: Any = numba
_BYTE, _WORD, _REAL = ir.IntType(8), ir.IntType(32), ir.FloatType()
_BYTES, _WORDS, _REALS = (ir.VectorType(kind, LANES) for kind in (_BYTE, _WORD, _REAL))


def _intrinsic(function: Callable[..., object]) -> Any:
    """Let compiled functions call what `function` emits."""
    return _numba.extending.intrinsic(function)


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any, pointee: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), pointee.as_pointer())


def _picked(builder: Any, values: Any, others: Any, places: list[int]) -> Any:
    """The elements of `values`, followed by `others`, that are at `places`."""
    return builder.shuffle_vector(values, others, ir.Constant(ir.VectorType(_WORD, len(places)), places))


def _everywhere(builder: Any, value: Any, kind: ir.Type) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _WORD(0))
    return _picked(builder, first, first, [0] * LANES)


@_intrinsic
def load_pixel(_: Any, source: Any, at: Any) -> Any:
    """`load_pixel(source, at)`: four bytes from `at` on, of which a pixel is the first three."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at = arguments
        return builder.load(_address(context, builder, signature.args[0], source, at, _WORD), align=1)

    return _numba.types.uint32(source, _numba.types.int64), emit


@_intrinsic
def blend(
    _: Any,
    source: Any,
    start: Any,
    step: Any,
    weights: Any,
    first: Any,
    taps: Any,
    target: Any,
    at: Any,
    by: Any,
) -> Any:
    """`blend(source, start, step, weights, first, taps, target, at, by)`: weighted sums of 16 bytes.

    Of `taps` rows of 16 bytes, from `start` on and `step` apart, with the weights from `first` on. Four bytes
    of the rounded sums go to `at`, the next to `at + by`, and so on.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, start, step, weights, first, taps, target, at, by = arguments
        half, bits = (ir.Constant(_WORDS, [value] * LANES) for value in (HALF, BITS))
        total = _numba.core.cgutils.alloca_once_value(builder, half)
        with _numba.core.cgutils.for_range(builder, taps) as loop:
            place = builder.add(start, builder.mul(step, loop.index))
            row = _address(context, builder, signature.args[0], source, place, _BYTES)
            place = builder.add(first, loop.index)
            weight = builder.load(_address(context, builder, signature.args[3], weights, place, _WORD))
            pixels = builder.zext(builder.load(row, align=1), _WORDS)
            product = builder.mul(pixels, _everywhere(builder, weight, _WORDS))
            builder.store(builder.add(builder.load(total), product), total)
        rounded = builder.trunc(builder.lshr(builder.load(total), bits), _BYTES)
        pixels = builder.bitcast(rounded, ir.VectorType(_WORD, ROWS))
        for row in range(ROWS):
            pointer = _address(context, builder, signature.args[6], target, at, _WORD)
            builder.store(builder.extract_element(pixels, _WORD(row)), pointer, align=1)
            at = builder.add(at, by)
        return context.get_dummy_value()

    place = _numba.types.int64
    return _numba.types.void(source, place, place, weights, place, place, target, place, place), emit


@_intrinsic
def recolor(_: Any, pixels: Any, at: Any, matrix: Any) -> Any:
    """`recolor(pixels, at, matrix)`: apply 12 float32 to 16 pixels from `at` on, in place.

    Sums in Pillow's order, and rounded as there.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pixels, at, matrix = arguments
        row = _address(context, builder, signature.args[0], pixels, at, ir.VectorType(_BYTE, 3 * LANES))
        mixed = builder.load(row, align=1)

        def number(i: int) -> Any:
            place = _address(context, builder, signature.args[2], matrix, _WORD(i), _REAL)
            return _everywhere(builder, builder.load(place), _REALS)

        colors = [_picked(builder, mixed, mixed, list(range(c, 3 * LANES, 3))) for c in range(3)]
        inputs = [builder.uitofp(color, _REALS) for color in colors]
        lowest, half, highest = (ir.Constant(_REALS, [value] * LANES) for value in (0.0, 0.5, 255.0))
        outputs = []
        for c in range(3):
            products = [builder.fmul(number(4 * c + i), inputs[i]) for i in range(3)]
            value = builder.fadd(builder.fadd(products[0], products[1]), products[2])
            value = builder.fadd(builder.fadd(value, number(4 * c + 3)), half)
            value = builder.select(builder.fcmp_ordered("<", value, lowest), lowest, value)
            value = builder.select(builder.fcmp_ordered(">", value, highest), highest, value)
            outputs.append(builder.fptoui(value, _BYTES))
        red_green = _picked(builder, outputs[0], outputs[1], list(range(2 * LANES)))
        blue = _picked(builder, outputs[2], outputs[2], list(range(2 * LANES)))
        places = [c * LANES + i for i in range(LANES) for c in range(3)]
        builder.store(_picked(builder, red_green, blue, places), row, align=1)
        return context.get_dummy_value()

    return _numba.types.void(pixels, _numba.types.int64, matrix), emit
