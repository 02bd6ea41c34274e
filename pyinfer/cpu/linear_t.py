"""y = x W (+ bias) (+ residual) for W kept row by row: each input element times its row, where it is not
zero.

A row is a neuron's output weights, so a neuron that did not fire costs nothing, not even memory. Items are
spans of columns: every thread owns a part of y and adds neurons in order, so y does not depend on the number
of threads, nor on how many zeros were skipped. Per 128 4-bit weights: 8 times and, convert, multiply-add, and
their share of the sums, which stay in the L1 cache and are loaded once per BLOCK neurons: 28 GB/s per thread
of a Zen 5 core; from memory, where rows lie apart, 17. A step of a 7B with BLOCK 12 takes 0.99 of one with 8
or 16. Rejected: neurons divided among threads instead of columns 1.00; a table lookup (vpermps) instead of
and + convert is faster by 5 %, but needs AVX-512.

For many rows see `pyinfer.cpu.linear_t_many`.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.gather import NOT_ZERO, select
from pyinfer.jit.codes import load_scales, tile_add_codes, tile_by_column, tile_from_codes
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i32_at, i64_at, prefetch
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    mul_f32x16,
    splat_f32x16,
    store_f32x16,
)
from pyinfer.jit.tiles import tile_add_memory, tile_load, tile_store, tile_tokens
from pyinfer.quants.neuron_rows import FLOAT_BLOCK
from pyinfer.quants.panels import Layout

# Operands, int64. FEATURES: elements of x, MORE: the rest of x in another buffer, WIDTH: columns, LISTING: a
# thread's list of neurons, TABLES: bytes from there to its tables, SUMS: where sums of [row][span] lie.
(
    WEIGHT, STRIDE, FEATURES, WIDTH, COUNT, X, X_STRIDE, X_PRIVATE, OUT, OUT_STRIDE, RESIDUAL,
    RESIDUAL_STRIDE, RESIDUAL_PRIVATE, BIAS, LISTING, LISTING_BYTES, TABLES, SUMS, MORE, MORE_STRIDE,
    MORE_PRIVATE, MORE_FEATURES,
) = range(22)  # fmt: skip
OPERANDS = 22

BLOCK, LARGE_BLOCK = 12, 32  # neurons between two passes over the sums, for one row of x and for several
TABLE_BYTES = 12 * LARGE_BLOCK + 8  # addresses, values, and their count


def tables_bytes(rows: int) -> int:
    """Bytes of a thread's tables for so many rows of x."""
    return (1 + rows) * TABLE_BYTES + 8


def span_of(layout: Layout) -> int:
    """Columns that one item makes: those of 16 words of codes, or FLOAT_BLOCK floats."""
    return FLOAT_BLOCK if layout.is_float else 512 // layout.bits


def sums_bytes(layout: Layout) -> int:
    """Bytes of the sums of one row and span."""
    return 4 * FLOAT_BLOCK if layout.is_float else 64 * (1 + 32 // layout.bits)


@cache
def linear_t(layout: Layout) -> Kernel:
    """The kernel for steps of few rows; items are spans of columns."""
    if layout.is_float:
        return _float_kernel(("f32", "f16", "bf16").index(layout.name))
    return _quantized_kernel(layout.bits, layout.group, int(layout.has_minimum))


@inline
def finish_span(given, t, thread, span, total, sums):
    """Sums of a span by position, plus residual and bias -> y. `sums`: where they lay, which is free now."""
    out_bytes = 64 * tile_tokens(total)
    at, here = span * out_bytes, given[OUT] + t * given[OUT_STRIDE]
    residual = given[RESIDUAL] + t * given[RESIDUAL_STRIDE] + thread * given[RESIDUAL_PRIVATE]
    total = tile_by_column(total)
    if at + out_bytes <= 4 * given[WIDTH]:
        if given[RESIDUAL] != 0:
            total = tile_add_memory(total, residual + at, 64)
        if given[BIAS] != 0:
            total = tile_add_memory(total, given[BIAS] + at, 64)
        tile_store(total, here + at, 64)
    else:
        tile_store(total, sums, 64)
        for part in range(at, 4 * given[WIDTH], 64):
            value = load_f32x16(sums + part - at)
            if given[RESIDUAL] != 0:
                value = add_f32x16(value, load_f32x16(residual + part))
            if given[BIAS] != 0:
                value = add_f32x16(value, load_f32x16(given[BIAS] + part))
            store_f32x16(here + part, value)


@inline
def _list(given, x, more, rows, listing):
    """The neurons of both inputs that any row has; returns how many."""
    features = given[FEATURES]
    n = select(x, given[X_STRIDE], rows, features, NOT_ZERO, 0, listing)
    if given[MORE_FEATURES] == 0:
        return n
    second = listing + 4 * n
    n_more = select(more, given[MORE_STRIDE], rows, given[MORE_FEATURES], NOT_ZERO, 0, second)
    wanted = i32_at(second)
    for i in range(n_more):
        wanted[i] += features
    return n + n_more


@inline
def _point_block(given, tables, inputs, listing, block, end, n, rows):
    """Tables for neurons [block, end): of every row of x the addresses and values of those that it has,
    behind the addresses of the neurons after them; returns how many those are.
    """
    (x, more), wanted, ahead = inputs, i32_at(listing), i64_at(tables)
    following = min(end - block, n - end)
    for i in range(following):
        ahead[i] = given[WEIGHT] + wanted[end + i] * given[STRIDE]
    features = given[FEATURES]
    for t in range(rows):
        hidden, table = f32_at(x + t * given[X_STRIDE]), tables + (1 + t) * TABLE_BYTES
        others = f32_at(more + t * given[MORE_STRIDE])
        pointers, factors, count = i64_at(table), f32_at(table + 8 * LARGE_BLOCK), 0
        for i in range(block, end):
            f = wanted[i]
            value = hidden[f] if f < features else others[f - features]
            pointers[count], factors[count] = given[WEIGHT] + f * given[STRIDE], value
            count += value != float32(0)
        pointers[LARGE_BLOCK + LARGE_BLOCK // 2] = count
    return following


def _quantized_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    together = group * bits // 16
    lanes = together // 2
    scale_bytes = 64 // together  # of a span
    size = 64 * (1 + positions)
    shift_share = 1 if has_minimum else -8 if bits == 4 else -128  # of the sum of shifts, in y
    tokens = 1 + positions

    @kernel
    def linear_t_quantized(operands, step, first, last, thread):
        given = i64_at(operands)
        rows, spans = i64_at(step)[given[COUNT]], (given[WIDTH] + 128 * 4 // bits - 1) // (128 * 4 // bits)
        listing = given[LISTING] + thread * given[LISTING_BYTES]
        x, more = given[X] + thread * given[X_PRIVATE], given[MORE] + thread * given[MORE_PRIVATE]
        n = _list(given, x, more, rows, listing)
        chunks = (given[WIDTH] + 2 * group - 1) // (2 * group)
        scales = (chunks * together + 15) // 16 * 64
        minima = scales + (chunks + 15) // 16 * 64
        for t in range(rows):
            for at in range(size * first, size * last, 64):
                store_f32x16(given[SUMS] + t * spans * size + at, splat_f32x16(float32(0)))
        tables = listing + given[TABLES]
        together_rows = BLOCK if rows == 1 else LARGE_BLOCK
        for block in range(0, n, together_rows):
            end = min(block + together_rows, n)
            following = _point_block(given, tables, (x, more), listing, block, end, n, rows)
            ahead = i64_at(tables)
            for span in range(first, last):
                at_scale = scales + scale_bytes * span
                for i in range(following):
                    prefetch(ahead[i] + 64 * span)
                if span == first or span * scale_bytes % 64 == 0:
                    for i in range(following):
                        prefetch(ahead[i] + at_scale)
                        if has_minimum:
                            prefetch(ahead[i] + minima - scales + at_scale)
                for t in range(rows):
                    sums, table = given[SUMS] + (t * spans + span) * size, tables + (1 + t) * TABLE_BYTES
                    pointers, factors = i64_at(table), f32_at(table + 8 * LARGE_BLOCK)
                    total = tile_load(tokens, sums, 64)
                    for i in range(pointers[LARGE_BLOCK + LARGE_BLOCK // 2]):
                        row, factor = pointers[i], splat_f32x16(factors[i])
                        scale = mul_f32x16(load_scales(row + at_scale, lanes), factor)
                        shift = scale
                        if has_minimum:
                            shift = mul_f32x16(load_scales(row + minima - scales + at_scale, lanes), factor)
                        total = tile_add_codes(total, row + 64 * span, scale, shift)
                    tile_store(total, sums, 64)
        for t in range(rows):
            for span in range(first, last):
                sums = given[SUMS] + (t * spans + span) * size
                total = tile_from_codes(tile_load(tokens, sums, 64), float32(shift_share))
                finish_span(given, t, thread, span, total, sums)

    return linear_t_quantized


def _float_kernel(kind: int) -> Kernel:
    width = 4 if kind == 0 else 2

    @kernel
    def linear_t_float(operands, step, first, last, thread):
        given = i64_at(operands)
        rows, listing = i64_at(step)[given[COUNT]], given[LISTING] + thread * given[LISTING_BYTES]
        x, wanted = given[X] + thread * given[X_PRIVATE], i32_at(listing)
        n = select(x, given[X_STRIDE], rows, given[FEATURES], NOT_ZERO, 0, listing)
        begin, end = FLOAT_BLOCK * first, min(FLOAT_BLOCK * last, given[WIDTH])
        for t in range(rows):
            sums = given[SUMS] + 4 * t * FLOAT_BLOCK * ((given[WIDTH] + FLOAT_BLOCK - 1) // FLOAT_BLOCK)
            hidden, total = f32_at(x + t * given[X_STRIDE]), f32_at(sums)
            for c in range(begin, FLOAT_BLOCK * last, 16):
                store_f32x16(sums + 4 * c, splat_f32x16(float32(0)))
            for i in range(n):
                f = wanted[i]
                if hidden[f] == float32(0):
                    continue
                row = given[WEIGHT] + f * given[STRIDE]
                factor = splat_f32x16(hidden[f])
                for c in range(begin, FLOAT_BLOCK * last, 16):
                    if kind == 0:
                        weight = load_f32x16(row + width * c)
                    elif kind == 1:
                        weight = load_f16x16(row + width * c)
                    else:
                        weight = load_bf16x16(row + width * c)
                    store_f32x16(sums + 4 * c, fma_f32x16(weight, factor, load_f32x16(sums + 4 * c)))
            out = f32_at(given[OUT] + t * given[OUT_STRIDE])
            residual = f32_at(given[RESIDUAL] + t * given[RESIDUAL_STRIDE] + thread * given[RESIDUAL_PRIVATE])
            bias = f32_at(given[BIAS])
            for c in range(begin, end):
                value = total[c]
                if given[RESIDUAL] != 0:
                    value += residual[c]
                if given[BIAS] != 0:
                    value += bias[c]
                out[c] = value

    return linear_t_float
