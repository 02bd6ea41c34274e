"""y = W x only where a mask asks for it, for W kept row by row: the neurons that fired, or are said to.

Sixteen wanted rows at a time are transposed in registers, so that they are what a panel holds and meet x as
in `pyinfer.cpu.linear`: results equal those of a dense matrix to the bit, for one token or a few. Bound: the
bytes of the wanted rows, which are asked for 16 rows ahead. Transposing takes 64 shuffles per 1024 bytes.

ns per row of 2304 bytes and thread, 2 threads, 11 % of the rows of 3 GB, where reading everything takes 63
(100 when the machine is slow): 105 (155). Loads of the same rows with no work at all: 87 (139), with idle
work 104, so it is memory that gives rows lying apart more slowly. Rejected, in the same run: prefetching half
or two batches of 16 rows ahead 0.96 to 1.07 of the time, spread over the work 0.96 to 1.02; by one thread a
dot product per row and group, then transposed, 1.24, though it needs two thirds of the operations. Before: a
whole panel made first, then multiplied, 1.24; lines asked for row by row 1.38.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.gather import (
    ABOVE,
    REACHING,
    code_blocks,
    gather_codes,
    gather_floats,
    gather_scales,
    point_rows,
    prefetch_rows,
    select,
)
from pyinfer.cpu.linear import (
    BIAS,
    COLUMNS,
    COUNT,
    OUT,
    OUT_STRIDE,
    PANEL_STRIDE,
    WEIGHT,
    X_PRIVATE,
    X_STRIDE,
    X,
    activation_parts,
    add_chunk,
)
from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i32_at, i64_at
from pyinfer.jit.simd import load_bf16x16, load_f16x16, load_f32x16
from pyinfer.jit.tiles import tile_add_product, tile_store, tile_zero
from pyinfer.jit.transpose import transpose_words
from pyinfer.quants.neuron_rows import BLOCK
from pyinfer.quants.panels import PANEL_ROWS, Layout

# Operands, int64, behind those of `pyinfer.cpu.linear`. BOUND: address of what `select` compares with.
# SCRATCH: a thread's memory, with, at so many bytes, TABLE: addresses of 32 rows, LISTING: the wanted rows,
# RESULT: 16 outputs per row of x, PANEL: a panel, or a block of codes and all scales. SLOTS: the parts that
# the wanted rows are divided into (items). LINEAR, INNER: the kernel for panels, its operands.
(
    WIDTH, MASK, MASK_STRIDE, MASK_PRIVATE, BOUND, LINEAR, INNER, SCRATCH, SCRATCH_BYTES, TABLE, RESULT,
    LISTING, PANEL, SLOTS,
) = range(13, 27)  # fmt: skip
OPERANDS = 27
INNER_BYTES = 128  # of one thread's operands of the linear kernel
BLOCK_BYTES = 64 * BLOCK  # of 16 words of 16 rows


@cache
def linear_at(layout: Layout, tile: int, rule: int, power: int) -> Kernel:
    """The kernel for steps of few rows; items are SLOTS parts of the wanted rows.

    rule : what the mask asks for (`pyinfer.cpu.gather.select`);  y is times mask to the `power`
    """
    if layout.is_float:
        return _few_floats(("f32", "f16", "bf16").index(layout.name), tile, rule, power)
    return _few_quantized(layout.bits, layout.group, int(layout.has_minimum), tile, rule, power)


@cache
def linear_rows(layout: Layout) -> Kernel:
    """The kernel that makes all of y, as `linear` does; items are 16 rows of W."""
    return _all_kernel(layout.bits, layout.group, int(layout.has_minimum))


@inline
def _begin(given, rows, scratch, mask, first, last, rule):
    """List the wanted rows, clear the part of y that belongs to these items; returns theirs, [begin, end)."""
    slots, width, listing = given[SLOTS], given[WIDTH], scratch + given[LISTING]
    wanted = i32_at(listing)
    n = select(mask, given[MASK_STRIDE], rows, width, rule, given[BOUND], listing)
    panels = (n + PANEL_ROWS - 1) // PANEL_ROWS
    begin, end = PANEL_ROWS * (panels * first // slots), min(n, PANEL_ROWS * (panels * last // slots))
    low = 0 if first == 0 else wanted[begin] if begin < n else width
    high = width if last == slots else wanted[end] if end < n else width
    for t in range(rows):
        out = f32_at(given[OUT] + t * given[OUT_STRIDE])
        for f in range(low, high):
            out[f] = float32(0)
    return begin, end


@inline
def _point(given, scratch, table, at, end):
    """The addresses of the wanted rows from `at`, behind the last its own again."""
    point_rows(table, scratch + given[LISTING], at, end - 1, given[WEIGHT], given[PANEL_STRIDE])


@inline
def _scatter(given, scratch, mask, rows, at, end, rule, power):
    """The results of 16 wanted rows -> their places in y, as the mask asks."""
    wanted = i32_at(scratch + given[LISTING] + 4 * at)
    bound, bias = f32_at(given[BOUND]), f32_at(given[BIAS])
    for t in range(rows):
        asked, out = f32_at(mask + t * given[MASK_STRIDE]), f32_at(given[OUT] + t * given[OUT_STRIDE])
        y = f32_at(scratch + given[RESULT] + 4 * PANEL_ROWS * t)
        for r in range(min(PANEL_ROWS, end - at)):
            f = wanted[r]
            value, factor = y[r], asked[f]
            if given[BIAS] != 0:
                value += bias[f]
            if power == 1:
                value *= factor
            elif power == 2:
                value *= factor * factor
            if rule == REACHING:
                missed = factor < bound[f]
            elif rule == ABOVE:
                missed = factor <= bound[0]
            else:
                missed = factor == float32(0)
            if missed:  # wanted by another row only
                value = float32(0)
            out[f] = value


def _few_quantized(bits: int, group: int, has_minimum: int, tile: int, rule: int, power: int) -> Kernel:
    together = group * bits // 16
    scale_bytes = 64 * (1 + has_minimum)

    @kernel
    def linear_at_quantized(operands, step, first, last, thread):
        given, words = i64_at(operands), i64_at(step)
        rows, stride = words[given[COUNT]], words[given[COUNT] + 1]
        scratch = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        mask = given[MASK] + thread * given[MASK_PRIVATE]
        begin, end = _begin(given, rows, scratch, mask, first, last, rule)
        chunks = (given[COLUMNS] + 2 * group - 1) // (2 * group)
        columns = 64 * ((given[COLUMNS] + 63) // 64)
        blocks = code_blocks(given[COLUMNS], bits, group)
        x, x_scale, sums, sums_scaled = activation_parts(given, stride, thread, group)
        table, codes = scratch + given[TABLE], scratch + given[PANEL]
        ahead, scales = table + 8 * PANEL_ROWS, codes + BLOCK_BYTES
        if begin < end:
            _point(given, scratch, table, begin, end)
        for at in range(begin, end, PANEL_ROWS):
            _point(given, scratch, ahead, at + PANEL_ROWS, end)
            gather_scales(table, ahead, scales, scale_bytes, blocks, chunks, has_minimum)
            for t in range(0, rows, tile):
                total, sum_tile = tile_zero(tile), t * columns // group * 4
                parts = x + t * columns, x_scale + t * columns // 8, sums + sum_tile, sums_scaled + sum_tile
                for chunk in range(chunks):
                    word = chunk * together
                    if word % BLOCK == 0:
                        prefetch_rows(ahead if t == 0 else 0, 4 * word)
                        transpose_words(table, 4 * word, codes, BLOCK, 0)
                    here, at_scale = codes + 64 * (word % BLOCK), scales + chunk * scale_bytes
                    total = add_chunk(total, here, at_scale, parts, 2 * chunk, bits, group, has_minimum)
                tile_store(total, scratch + given[RESULT] + 4 * PANEL_ROWS * t, 4 * PANEL_ROWS)
            _scatter(given, scratch, mask, rows, at, end, rule, power)
            table, ahead = ahead, table

    return linear_at_quantized


def _few_floats(kind: int, tile: int, rule: int, power: int) -> Kernel:
    bits = 32 if kind == 0 else 16

    @kernel
    def linear_at_floats(operands, step, first, last, thread):
        given = i64_at(operands)
        rows = i64_at(step)[given[COUNT]]
        scratch = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        mask = given[MASK] + thread * given[MASK_PRIVATE]
        begin, end = _begin(given, rows, scratch, mask, first, last, rule)
        table, panel = scratch + given[TABLE], scratch + given[PANEL]
        ahead = table + 8 * PANEL_ROWS
        if begin < end:
            _point(given, scratch, table, begin, end)
        for at in range(begin, end, PANEL_ROWS):
            _point(given, scratch, ahead, at + PANEL_ROWS, end)
            gather_floats(table, ahead, panel, given[COLUMNS], bits)
            for t in range(0, rows, tile):
                total = tile_zero(tile)
                x = given[X] + thread * given[X_PRIVATE] + t * given[X_STRIDE]
                for c in range(given[COLUMNS]):
                    if kind == 0:
                        column = load_f32x16(panel + 64 * c)
                    elif kind == 1:
                        column = load_f16x16(panel + 32 * c)
                    else:
                        column = load_bf16x16(panel + 32 * c)
                    total = tile_add_product(total, column, x + 4 * c, given[X_STRIDE])
                tile_store(total, scratch + given[RESULT] + 4 * PANEL_ROWS * t, 4 * PANEL_ROWS)
            _scatter(given, scratch, mask, rows, at, end, rule, power)
            table, ahead = ahead, table

    return linear_at_floats


def _all_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    group_bytes = 2 * bits * group
    chunk_bytes = 2 * group_bytes + 64 * (1 + has_minimum)

    @kernel
    def linear_rows_all(operands, step, first, last, thread):
        given = i64_at(operands)
        scratch = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        table, panel = scratch + given[TABLE], scratch + given[PANEL]
        pointers, arguments = i64_at(table), given[INNER] + thread * INNER_BYTES
        inner, columns = i64_at(arguments), given[COLUMNS]
        for item in range(first, last):
            for r in range(PANEL_ROWS):
                row = min(PANEL_ROWS * item + r, given[WIDTH] - 1)
                pointers[r] = given[WEIGHT] + row * given[PANEL_STRIDE]
            if group == 1:
                gather_floats(table, 0, panel, columns, bits)
            else:
                gather_codes(table, panel, chunk_bytes, code_blocks(columns, bits, group), group * bits // 16)
                blocks, chunks = code_blocks(columns, bits, group), (columns + 2 * group - 1) // (2 * group)
                at_scales = panel + 2 * group_bytes
                gather_scales(table, 0, at_scales, chunk_bytes, blocks, chunks, has_minimum)
            inner[OUT] = given[OUT] + 4 * PANEL_ROWS * item
            if given[BIAS] != 0:
                inner[BIAS] = given[BIAS] + 4 * PANEL_ROWS * item
            call_kernel(given[LINEAR], arguments, step, 0, 1, thread)

    return linear_rows_all
