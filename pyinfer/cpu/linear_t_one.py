"""y = x W (+ bias) (+ residual) for W kept row by row and one row of x: neurons are divided, so that whole
rows are read, which memory gives faster than parts of rows.

Neurons belong to PARTS parts, 16 neighbours to each in turn. A part has sums of its own, which stay in the L1
cache, and `total` adds the parts in order: y does not depend on the number of threads. Otherwise as
`pyinfer.cpu.linear_t`.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.linear_t import (
    FEATURES,
    LISTING,
    LISTING_BYTES,
    MORE,
    MORE_FEATURES,
    MORE_PRIVATE,
    STRIDE,
    SUMS,
    TABLES,
    WEIGHT,
    WIDTH,
    X_PRIVATE,
    X,
    finish_span,
)
from pyinfer.jit.codes import list_bits, load_scales, nonzero_bits, tile_add_codes, tile_from_codes
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i32_at, i64_at, prefetch
from pyinfer.jit.simd import mul_f32x16, splat_f32x16, store_f32x16
from pyinfer.jit.tiles import tile_add_memory, tile_load, tile_store
from pyinfer.quants.panels import Layout

PARTS = 8
BLOCK = 16  # rows between two passes over the sums
TABLES_BYTES = 2 * 8 * BLOCK + 4 * BLOCK + 8 * (PARTS + 1)  # addresses, following ones, values, bounds


@cache
def linear_t_one(layout: Layout) -> Kernel:
    """Sums of every part; items are parts."""
    return _parts_kernel(layout.bits, layout.group, int(layout.has_minimum))


@cache
def total(layout: Layout) -> Kernel:
    """y from the sums of all parts; items are spans of columns."""
    return _total_kernel(layout.bits, int(layout.has_minimum))


@inline
def _list(x, features, start, part, listing):
    """Those of a part's neurons that are not 0, `start` added; returns how many."""
    count = 0
    for f in range(16 * part, features, 16 * PARTS):
        bits = nonzero_bits(x + 4 * f)
        if features - f < 16:
            bits &= (1 << (features - f)) - 1
        if bits != 0:
            count += list_bits(bits, start + f, listing + 4 * count)
    return count


@inline
def _list_parts(given, first, last, thread, listing, bounds):
    """The neurons of parts [first, last), and where each part begins; returns how many."""
    x, more = given[X] + thread * given[X_PRIVATE], given[MORE] + thread * given[MORE_PRIVATE]
    n = 0
    for part in range(first, last):
        bounds[part - first] = n
        n += _list(x, given[FEATURES], 0, part, listing + 4 * n)
        n += _list(more, given[MORE_FEATURES], given[FEATURES], part, listing + 4 * n)
    bounds[last - first] = n
    return n


@inline
def _point(given, thread, listing, begin, end, until, table):
    """Addresses and values of the listed neurons [begin, end), and addresses of those up to `until`."""
    wanted, pointers, factors = i32_at(listing), i64_at(table), f32_at(table + 16 * BLOCK)
    x = f32_at(given[X] + thread * given[X_PRIVATE])
    more, features = f32_at(given[MORE] + thread * given[MORE_PRIVATE]), given[FEATURES]
    for i in range(begin, end):
        f = wanted[i]
        pointers[i - begin] = given[WEIGHT] + f * given[STRIDE]
        factors[i - begin] = x[f] if f < features else more[f - features]
    for i in range(end, until):
        pointers[BLOCK + i - end] = given[WEIGHT] + wanted[i] * given[STRIDE]


def _parts_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    together = group * bits // 16
    lanes = together // 2
    scale_bytes = 64 // together  # of a span
    size, tokens = 64 * (1 + positions), 1 + positions

    @kernel
    def linear_t_parts(operands, step, first, last, thread):
        given = i64_at(operands)
        spans = (given[WIDTH] + 16 * positions - 1) // (16 * positions)
        chunks = (given[WIDTH] + 2 * group - 1) // (2 * group)
        scales = (chunks * together + 15) // 16 * 64
        to_minima = (chunks + 15) // 16 * 64
        listing = given[LISTING] + thread * given[LISTING_BYTES]
        table = listing + given[TABLES]
        pointers, factors, bounds = i64_at(table), f32_at(table + 16 * BLOCK), i64_at(table + 20 * BLOCK)
        for at in range(size * spans * first, size * spans * last, 64):
            store_f32x16(given[SUMS] + at, splat_f32x16(float32(0)))
        n = _list_parts(given, first, last, thread, listing, bounds)
        begin, part = 0, first
        while begin < n:
            while begin >= bounds[part - first + 1]:
                part += 1
            end = min(begin + BLOCK, bounds[part - first + 1])
            until = min(end + BLOCK, n)
            _point(given, thread, listing, begin, end, until, table)
            for span in range(spans):
                at_scale = scales + scale_bytes * span
                for i in range(BLOCK, BLOCK + until - end):
                    prefetch(pointers[i] + 64 * span)
                if span * scale_bytes % 64 == 0:
                    for i in range(BLOCK, BLOCK + until - end):
                        prefetch(pointers[i] + at_scale)
                        if has_minimum:
                            prefetch(pointers[i] + to_minima + at_scale)
                sums = given[SUMS] + (part * spans + span) * size
                found = tile_load(tokens, sums, 64)
                for i in range(end - begin):
                    row, factor = pointers[i], splat_f32x16(factors[i])
                    scale = mul_f32x16(load_scales(row + at_scale, lanes), factor)
                    shift = scale
                    if has_minimum:
                        shift = mul_f32x16(load_scales(row + to_minima + at_scale, lanes), factor)
                    found = tile_add_codes(found, row + 64 * span, scale, shift)
                tile_store(found, sums, 64)
            begin = end

    return linear_t_parts


def _total_kernel(bits: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    size, tokens = 64 * (1 + positions), 1 + positions
    shift_share = 1 if has_minimum else -8 if bits == 4 else -128  # of the sum of shifts, in y

    @kernel
    def linear_t_total(operands, step, first, last, thread):
        given = i64_at(operands)
        spans = (given[WIDTH] + 16 * positions - 1) // (16 * positions)
        for span in range(first, last):
            sums = tile_load(tokens, given[SUMS] + span * size, 64)
            for part in range(1, PARTS):
                sums = tile_add_memory(sums, given[SUMS] + (part * spans + span) * size, 64)
            finish_span(given, 0, thread, span, tile_from_codes(sums, float32(shift_share)))

    return linear_t_total
