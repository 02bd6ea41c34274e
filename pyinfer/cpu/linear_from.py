"""y = W x (+ bias) from the columns of W where x is not zero: of x behind a ReLU, about half of the bytes.

Columns of one group of weights are taken four at a time, their bytes are interleaved, and so they meet four
elements of x in one dot product, as neighbouring columns do in `pyinfer.cpu.linear`: results equal those of a
dense matrix to the bit. Items are lines of outputs: every thread reads its part of each column. Bound: the
bytes of the columns that are read and of all scales. Four lines of 64 bytes take 16 shuffles, 12 operations
to unpack and 8 dot products (half of that for 8 bits); a group and line 12 operations for each 16 outputs.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.linear import (
    BIAS,
    COLUMNS,
    COUNT,
    OUT,
    OUT_STRIDE,
    PANEL_STRIDE,
    WEIGHT,
    activation_parts,
)
from pyinfer.jit.codes import lowest_bit, nonzero_bytes
from pyinfer.jit.columns import tile_add_columns, tile_add_halves, tile_dot_columns, tile_fill_i32
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i32_at, i64_at, prefetch, u8_at
from pyinfer.jit.simd import add_f32x16, load_f32x16, splat_f32x16, store_f32x16
from pyinfer.jit.tiles import tile_load, tile_store
from pyinfer.quants.panels import Layout

# Operands, int64, behind those of `pyinfer.cpu.linear`, whose PANEL_STRIDE is that of a group. TABLE: a
# thread's addresses of this group's columns and of the next group's, then of every row of x the four bytes
# that belong to four columns.
LINES, TABLE, TABLE_BYTES = range(13, 16)
OPERANDS = 16
MOST_GROUP = 32


def table_bytes(rows: int) -> int:
    """Bytes of a thread's tables for so many rows of x."""
    return 2 * 8 * MOST_GROUP + rows * MOST_GROUP


@cache
def linear_from(layout: Layout, tile: int) -> Kernel:
    """The kernel for matrices in columns and so many rows of x in a tile; items are lines."""
    return _kernel(layout.bits, layout.group, int(layout.has_minimum), tile)


@inline
def _codes_of(x, columns, t, tile, g, group):
    """Address of the bytes of row t of x in group g (see `pyinfer.cpu.linear.prepared_parts`)."""
    halves = 32 // group
    return x + t // tile * tile * columns + 32 * (tile * (g // halves) + t % tile) + g % halves * group


@inline
def _used(x, columns, rows, tile, g, group):
    """Bit c tells whether any row has column c of group g."""
    bits = 0
    for t in range(rows):
        bits |= nonzero_bytes(_codes_of(x, columns, t, tile, g, group))
    return bits & ((1 << group) - 1)


@inline
def _point(bits, base, column_bytes, table):
    """Addresses of the columns that are set, made a multiple of 4 by repeating the last; returns how many."""
    pointers, count = i64_at(table), 0
    while bits != 0:
        pointers[count] = base + lowest_bit(bits) * column_bytes
        bits &= bits - 1
        count += 1
    while count % 4 != 0:
        pointers[count] = pointers[count - 1]
        count += 1
    return count


@inline
def _spread(bits, codes, target):
    """The bytes at the bits that are set, side by side, with zeros up to a multiple of 4."""
    source, out, count = u8_at(codes), u8_at(target), 0
    while bits != 0:
        out[count] = source[lowest_bit(bits)]
        bits &= bits - 1
        count += 1
    while count % 4 != 0:
        out[count] = 0
        count += 1


@inline
def _prefetch(table, count, scales, scale_lines, line):
    """One line of columns whose addresses are in the table, and their scales."""
    pointers = i64_at(table)
    for i in range(0, count, 4):
        for k in range(4):
            prefetch(pointers[i + k] + 64 * line)
    if count > 0:
        for k in range(scale_lines):
            prefetch(scales + 64 * (scale_lines * line + k))


def _kernel(bits: int, group: int, has_minimum: int, tile: int) -> Kernel:
    positions = 32 // bits
    out_bytes, half_bytes = 64 * positions, 32 * positions  # of a line's outputs, and of their scales
    shift = 0 if bits == 4 else 4
    halves = 32 // group

    @kernel
    def linear_from_quantized(operands, step, first, last, thread):
        given, words = i64_at(operands), i64_at(step)
        rows, stride, lines = words[given[COUNT]], words[given[COUNT] + 1], given[LINES]
        columns, groups = 64 * ((given[COLUMNS] + 63) // 64), given[COLUMNS] // group
        x, x_scale, x_sums, sums_scaled = activation_parts(given, stride, thread, group)
        here = given[TABLE] + thread * given[TABLE_BYTES]
        ahead, spread = here + 8 * MOST_GROUP, here + 16 * MOST_GROUP
        for t in range(rows):
            for at in range(out_bytes * first, out_bytes * last, 64):
                store_f32x16(given[OUT] + t * given[OUT_STRIDE] + at, splat_f32x16(float32(0)))
        bits_here, count = 0, 0
        for g in range(-1, groups):
            base = given[WEIGHT] + (g + 1) * given[PANEL_STRIDE]
            bits_ahead = _used(x, columns, rows, tile, g + 1, group) if g + 1 < groups else 0
            following = _point(bits_ahead, base, 64 * lines, ahead)
            scales = base - given[PANEL_STRIDE] + 64 * group * lines
            if count > 0:
                for t in range(rows):
                    codes = _codes_of(x, columns, t, tile, g, group)
                    _spread(bits_here, codes, spread + MOST_GROUP * t)
            for line in range(first, last):
                _prefetch(ahead, following, scales + given[PANEL_STRIDE], half_bytes // 64, line)
                if count == 0:
                    continue
                for t in range(rows):
                    t0, r = t // tile * tile, t % tile
                    at_sum = 4 * (t0 * columns // group + g * tile + r)
                    pointers, four = i64_at(here), i32_at(spread + MOST_GROUP * t)
                    start = 0 if has_minimum else i32_at(x_sums + at_sum)[0] << shift
                    acc = tile_fill_i32(positions, start)
                    for i in range(0, count, 4):
                        acc = tile_dot_columns(
                            acc, pointers[i] + 64 * line, pointers[i + 1] + 64 * line,
                            pointers[i + 2] + 64 * line, pointers[i + 3] + 64 * line, four[i // 4],
                        )  # fmt: skip
                    out = given[OUT] + t * given[OUT_STRIDE] + out_bytes * line
                    factor = f32_at(x_scale + t0 * columns // 8)[tile * (g // halves) + r]
                    total = tile_load(positions, out, 64)
                    total = tile_add_columns(total, acc, scales + half_bytes * line, factor)
                    if has_minimum:
                        minima = scales + half_bytes * (lines + line)
                        total = tile_add_halves(total, minima, f32_at(sums_scaled + at_sum)[0])
                    tile_store(total, out, 64)
            here, ahead = ahead, here
            bits_here, count = bits_ahead, following
        if given[BIAS] != 0:
            for t in range(rows):
                for at in range(out_bytes * first, out_bytes * last, 64):
                    out = given[OUT] + t * given[OUT_STRIDE] + at
                    store_f32x16(out, add_f32x16(load_f32x16(out), load_f32x16(given[BIAS] + at)))

    return linear_from_quantized
