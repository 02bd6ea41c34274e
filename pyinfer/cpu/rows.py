"""Operations on rows, one row after the other: everything of a step that is neither linear nor attention.

Items are rows. In a step of one row every thread does them all into a private copy, which costs less than a
barrier. Vectors of a row are read and written by plain loops that LLVM vectorizes.
"""

from __future__ import annotations

from functools import cache

from numpy import float32, int32, sqrt, uint32

from pyinfer.cpu.math import gelu, relu, silu
from pyinfer.cpu.step import POSITIONS, TOKENS, WANTED_ROWS
from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import (
    bits_to_float,
    f32_at,
    float_to_half,
    half_to_float,
    i32_at,
    i64_at,
    u16_at,
)
from pyinfer.jit.simd import (
    largest_of_32,
    load_f32x16,
    mul_f32x16,
    round_i32x16,
    splat_f32x16,
    store_i8x16,
    sum_i32x16,
)
from pyinfer.quants import panels
from pyinfer.quants.panels import PANEL_ROWS, Layout

# Operands of all row kernels, int64: up to two inputs and an output as (address, row stride, private stride),
# then what is special.
IN, IN_STRIDE, IN_PRIVATE, IN2, IN2_STRIDE, IN2_PRIVATE, OUT, OUT_STRIDE, OUT_PRIVATE, WIDTH, COUNT = range(
    11
)
FIRST_EXTRA = 11
OPERANDS = 18
WEIGHT, EPSILON, HEADS = 11, 12, 13  # rms_norm; EPSILON is the address of a float32
TABLE, HEAD_SIZE, ROTATED, NEOX, ROPE_HEADS = 11, 12, 13, 14, 15  # rope
TILE = 11  # quantize
PACK, DATA, ROW_BYTES, PANEL, PANEL_BYTES, SCALE = (
    11,
    12,
    13,
    14,
    15,
    16,
)  # embed; SCALE is the address of a float32


@inline
def _row(given, base, row, thread):
    return given[base] + row * given[base + 1] + thread * given[base + 2]


@kernel
def rms_norm(operands, step, first, last, thread):
    """out = x / sqrt(mean x^2 + epsilon) * weight, for each of HEADS parts of a row. Source: Zhang & Sennrich
    2019.
    """
    given = i64_at(operands)
    heads = given[HEADS]
    width = given[WIDTH] // heads
    weight, epsilon = f32_at(given[WEIGHT]), f32_at(given[EPSILON])[0]
    for row in range(first, last):
        for head in range(heads):
            x = f32_at(_row(given, IN, row, thread) + 4 * head * width)
            out = f32_at(_row(given, OUT, row, thread) + 4 * head * width)
            total = float32(0)
            for i in range(width):
                total += x[i] * x[i]
            factor = float32(1) / sqrt(total / float32(width) + epsilon)
            for i in range(width):
                out[i] = x[i] * factor * weight[i]


@kernel
def add(operands, step, first, last, thread):
    """out = a + b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(_row(given, IN, row, thread)), f32_at(_row(given, IN2, row, thread))
        out = f32_at(_row(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = a[i] + b[i]


@kernel
def gate_silu(operands, step, first, last, thread):
    """out = silu(a) * b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(_row(given, IN, row, thread)), f32_at(_row(given, IN2, row, thread))
        out = f32_at(_row(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = silu(a[i]) * b[i]


@kernel
def gate_gelu(operands, step, first, last, thread):
    """out = gelu(a) * b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(_row(given, IN, row, thread)), f32_at(_row(given, IN2, row, thread))
        out = f32_at(_row(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = gelu(a[i]) * b[i]


@kernel
def gate_relu(operands, step, first, last, thread):
    """out = relu(a) * b"""
    given = i64_at(operands)
    for row in range(first, last):
        a, b = f32_at(_row(given, IN, row, thread)), f32_at(_row(given, IN2, row, thread))
        out = f32_at(_row(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = relu(a[i]) * b[i]


@kernel
def select(operands, step, first, last, thread):
    """out[i] = x[wanted[i]]: the rows whose logits are asked for. Items are wanted rows."""
    given = i64_at(operands)
    wanted = i32_at(i64_at(step)[WANTED_ROWS])
    for item in range(first, last):
        x, out = f32_at(_row(given, IN, wanted[item], thread)), f32_at(_row(given, OUT, item, thread))
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
        source = _row(given, IN, row, thread)
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
            x = f32_at(_row(given, IN, row, thread) + 4 * head * size)
            out = f32_at(_row(given, OUT, row, thread) + 4 * head * size)
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


@cache
def embed(layout: Layout) -> Kernel:
    """Rows of the embedding matrix, which stays in the file: a token's row is packed into a panel and read
    back from there.
    """
    bits, group, minimum = layout.bits, layout.group, int(layout.has_minimum)
    kind = 0 if not layout.is_float else 1 + ("f32", "f16", "bf16").index(layout.name)
    return _embed_kernel(kind, bits, group, minimum)


def _embed_kernel(kind: int, bits: int, group: int, has_minimum: int) -> Kernel:
    zero = 0 if has_minimum else 8 if bits == 4 else 128

    @kernel
    def embed_rows(operands, step, first, last, thread):
        given = i64_at(operands)
        tokens = i32_at(i64_at(step)[TOKENS])
        columns, scale = given[WIDTH], f32_at(given[SCALE])[0]
        panel = given[PANEL] + thread * (given[PANEL_BYTES] + 64)
        pack = i64_at(panel + given[PANEL_BYTES])
        pack[panels.TARGET], pack[panels.ROWS] = panel, 1
        pack[panels.COLUMNS], pack[panels.PANEL_STRIDE] = columns, given[PANEL_BYTES]
        for row in range(first, last):
            pack[panels.SOURCE] = given[DATA] + tokens[row] * given[ROW_BYTES]
            call_kernel(given[PACK], panel + given[PANEL_BYTES], step, 0, 1, thread)
            out = f32_at(_row(given, OUT, row, thread))
            for c in range(columns):
                if kind == 0:
                    out[c] = scale * _coded(panel, c, bits, group, zero, has_minimum)
                else:
                    out[c] = scale * _float_of(kind, panel, c * PANEL_ROWS)

    return embed_rows


@inline
def _coded(panel, column, bits, group, zero, has_minimum):
    """Row 0 of a panel at a column: see pyinfer.quants.panels."""
    group_bytes = 2 * bits * group
    g = column // group
    chunk = panel + g // 2 * (2 * group_bytes + 64 * (1 + has_minimum))
    codes, quad = chunk + g % 2 * group_bytes, column % group // 4
    if bits == 4:
        code = i64_at(codes + 64 * (quad // 2))[0] >> (8 * (column % 4) + 4 * (quad % 2)) & 15
    else:
        code = i64_at(codes + 64 * quad)[0] >> (8 * (column % 4)) & 255
    halves = u16_at(chunk + 2 * group_bytes + 32 * (g % 2))
    value = half_to_float(halves[0]) * float32(code - zero)
    return value + half_to_float(halves[32]) if has_minimum else value


@inline
def _float_of(kind, panel, at):
    if kind == 1:
        return f32_at(panel)[at]
    if kind == 2:
        return half_to_float(u16_at(panel)[at])
    return bits_to_float(uint32(uint32(u16_at(panel)[at]) << 16))
