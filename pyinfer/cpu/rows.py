"""Operations on rows, one row after the other: what linears and attention leave.

Items are rows. In a step of one row every thread does them all into a private copy, which costs less than a
barrier. Vectors of a row are read and written by plain loops that LLVM vectorizes. Norms, activations and
embeddings, which are row operations too, have files of their own.
"""

from __future__ import annotations

from numpy import float32, int32

from pyinfer.cpu.step import POSITIONS, WANTED_ROWS
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import f32_at, float_to_half, half_to_float, i32_at, i64_at
from pyinfer.jit.simd import (
    largest_of_32,
    load_f32x16,
    mul_f32x16,
    round_i32x16,
    splat_f32x16,
    store_i8x16,
    sum_i32x16,
)

# Operands of all row kernels, int64: up to two inputs and an output as (address, row stride, private stride),
# then what is special to a kernel. SCALE, EPSILON and NUMBER are addresses of a float32.
(IN, IN_STRIDE, IN_PRIVATE, IN2, IN2_STRIDE, IN2_PRIVATE, OUT, OUT_STRIDE, OUT_PRIVATE, WIDTH,
 COUNT) = range(11)  # fmt: skip
OPERANDS = 18
TABLE, HEAD_SIZE, ROTATED, NEOX, ROPE_HEADS = range(11, 16)  # rope
TILE = 11  # quantize
WEIGHT, BIAS, EPSILON, HEADS = range(11, 15)  # norms; BIAS may be 0
NUMBER = 11  # activations (the threshold), scale (the factor)
PACK, DATA, ROW_BYTES, PANEL, PANEL_BYTES, SCALE, OFFSET = range(11, 18)  # embeddings


@inline
def row_at(given, base, row, thread):
    """Address of a row of the input or output whose operands begin at `base`."""
    return given[base] + row * given[base + 1] + thread * given[base + 2]


@kernel
def add(operands, step, first, last, thread):
    """out = a + b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, IN2, row, thread))
        out = f32_at(row_at(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = a[i] + b[i]


@kernel
def multiply(operands, step, first, last, thread):
    """out = a * b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, IN2, row, thread))
        out = f32_at(row_at(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = a[i] * b[i]


@kernel
def scale(operands, step, first, last, thread):
    """out = x * factor, with NUMBER the factor"""
    given = i64_at(operands)
    factor = f32_at(given[NUMBER])[0]
    for row in range(first, last):
        x, out = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = x[i] * factor


@kernel
def select(operands, step, first, last, thread):
    """out[i] = x[wanted[i]]: the rows whose logits are asked for. Items are wanted rows."""
    given = i64_at(operands)
    wanted = i32_at(i64_at(step)[WANTED_ROWS])
    for item in range(first, last):
        x, out = f32_at(row_at(given, IN, wanted[item], thread)), f32_at(row_at(given, OUT, item, thread))
        for i in range(given[WIDTH]):
            out[i] = x[i]


@kernel
def quantize(operands, step, first, last, thread):
    """int8 per 32 with scale amax / 127, and sums: the parts of `pyinfer.cpu.linear.prepared_parts`.

    The scale is rounded to a half, as llama.cpp's Q8_0 does, so that results are comparable to the last bits.
    OUT_STRIDE is unused.
    """
    given = i64_at(operands)
    stride, tile = i64_at(step)[given[COUNT] + 1], given[TILE]
    groups = (given[WIDTH] + 63) // 64 * 2  # an odd last group is followed by one of zeros
    out = given[OUT] + thread * given[OUT_PRIVATE]
    scales = out + groups * 32 * stride
    part = groups * stride * 4
    scale_at, sums, sums_scaled = f32_at(scales), i32_at(scales + part), f32_at(scales + 2 * part)
    halves, halves_scaled = i32_at(scales + 3 * part), f32_at(scales + 5 * part)
    for row in range(first, last):
        source = row_at(given, IN, row, thread)
        first_of_tile = row // tile * tile
        for g in range(given[WIDTH] // 32):
            x, y = load_f32x16(source + 128 * g), load_f32x16(source + 128 * g + 64)
            largest = largest_of_32(x, y)
            inverse = splat_f32x16(float32(127) / largest if largest > float32(0) else float32(0))
            scale = half_to_float(float_to_half(largest / float32(127)))
            at = first_of_tile * groups + g * tile + row - first_of_tile
            x_codes, y_codes = round_i32x16(mul_f32x16(x, inverse)), round_i32x16(mul_f32x16(y, inverse))
            store_i8x16(out + 32 * at, x_codes)
            store_i8x16(out + 32 * at + 16, y_codes)
            low, high = sum_i32x16(x_codes), sum_i32x16(y_codes)
            scale_at[at] = scale
            sums[at] = int32(-8 * (low + high))
            sums_scaled[at] = scale * float32(low + high)
            pair = 2 * at - (row - first_of_tile)
            halves[pair], halves[pair + tile] = int32(-8 * low), int32(-8 * high)
            halves_scaled[pair], halves_scaled[pair + tile] = scale * float32(low), scale * float32(high)
        if groups * 32 > given[WIDTH]:
            at = first_of_tile * groups + (groups - 1) * tile + row - first_of_tile
            pair = 2 * at - (row - first_of_tile)
            scale_at[at], sums[at], sums_scaled[at] = float32(0), int32(0), float32(0)
            halves[pair], halves[pair + tile] = int32(0), int32(0)
            halves_scaled[pair], halves_scaled[pair + tile] = float32(0), float32(0)


@kernel
def rope(operands, step, first, last, thread):
    """Rotate ROPE_HEADS heads of a row by its position; TABLE is float32 [position][ROTATED / 2][cos, sin].

    NEOX pairs element i with i + ROTATED / 2, otherwise neighbours are pairs. Source: RoFormer (Su et al.
    2021), ggml's two modes.
    """
    given = i64_at(operands)
    positions = i32_at(i64_at(step)[POSITIONS])
    half, size = given[ROTATED] // 2, given[HEAD_SIZE]
    for row in range(first, last):
        table = f32_at(given[TABLE] + positions[row] * half * 8)
        for head in range(given[ROPE_HEADS]):
            x = f32_at(row_at(given, IN, row, thread) + 4 * head * size)
            out = f32_at(row_at(given, OUT, row, thread) + 4 * head * size)
            if given[NEOX] != 0:
                for i in range(half):
                    a, b = x[i], x[i + half]
                    out[i] = a * table[2 * i] - b * table[2 * i + 1]
                    out[i + half] = b * table[2 * i] + a * table[2 * i + 1]
            else:
                for i in range(half):
                    a, b = x[2 * i], x[2 * i + 1]
                    out[2 * i] = a * table[2 * i] - b * table[2 * i + 1]
                    out[2 * i + 1] = b * table[2 * i] + a * table[2 * i + 1]
            for i in range(2 * half, size):
                out[i] = x[i]
