"""y = x W (+ bias) (+ residual) for W kept row by row: each input element times its row, where it is not
zero.

A row is a neuron's output weights, so a neuron that did not fire costs nothing, not even memory. Items are
spans of columns: every thread owns a part of y and adds neurons in order, so y does not depend on the number
of threads, nor on how many zeros were skipped. Per 128 4-bit weights: 8 times and, convert, multiply-add, and
their share of the sums, which stay in the L1 cache and are loaded once per BLOCK neurons: 28 GB/s per thread
of a Zen 5 core. BLOCK 4 and 16 are slower by a fifth, 2 by half; a table lookup (vpermps) instead of and +
convert is faster by 5 %, but needs AVX-512.

For many rows see `pyinfer.cpu.linear_t_many`.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.gather import select
from pyinfer.jit.codes import load_scales, tile_add_codes
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i32_at, i64_at, prefetch
from pyinfer.jit.simd import (
    fma_f32x16,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    mul_f32x16,
    splat_f32x16,
    store_f32x16,
)
from pyinfer.jit.tiles import tile_load, tile_store
from pyinfer.quants.neuron_rows import FLOAT_BLOCK
from pyinfer.quants.panels import Layout

# Operands, int64. FEATURES: neurons (rows of W), WIDTH: columns, LISTING: a thread's list of neurons, SUMS:
# where sums of [row][span] lie.
(
    WEIGHT, STRIDE, FEATURES, WIDTH, COUNT, X, X_STRIDE, X_PRIVATE, OUT, OUT_STRIDE, RESIDUAL,
    RESIDUAL_STRIDE, RESIDUAL_PRIVATE, BIAS, LISTING, LISTING_BYTES, SUMS,
) = range(17)  # fmt: skip
OPERANDS = 17

BLOCK = 8  # neurons between two passes over the sums


def span_of(layout: Layout) -> int:
    """Columns that one item makes: those of 16 words."""
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
def first_value(given, t, thread, column):
    """Residual + bias of one element of y."""
    value = float32(0)
    if given[RESIDUAL] != 0:
        at = given[RESIDUAL] + t * given[RESIDUAL_STRIDE] + thread * given[RESIDUAL_PRIVATE]
        value += f32_at(at)[column]
    if given[BIAS] != 0:
        value += f32_at(given[BIAS])[column]
    return value


def _quantized_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    together = group * bits // 16
    lanes = together // 2
    scale_bytes = 64 // together  # of a span
    size = 64 * (1 + positions)
    zero = 0 if has_minimum else 8 if bits == 4 else 128
    tokens = 1 + positions

    @kernel
    def linear_t_quantized(operands, step, first, last, thread):
        given = i64_at(operands)
        rows, spans = i64_at(step)[given[COUNT]], (given[WIDTH] + 128 * 4 // bits - 1) // (128 * 4 // bits)
        listing = given[LISTING] + thread * given[LISTING_BYTES]
        x, wanted = given[X] + thread * given[X_PRIVATE], i32_at(listing)
        n = select(x, given[X_STRIDE], rows, given[FEATURES], 0, listing)
        chunks = (given[WIDTH] + 2 * group - 1) // (2 * group)
        scales = (chunks * together + 15) // 16 * 64
        minima = scales + (chunks + 15) // 16 * 64
        for t in range(rows):
            for at in range(size * first, size * last, 64):
                store_f32x16(given[SUMS] + t * spans * size + at, splat_f32x16(float32(0)))
        here = i64_at(listing + given[LISTING_BYTES] - 16 * BLOCK)  # addresses of the rows of this block
        next_rows = i64_at(listing + given[LISTING_BYTES] - 8 * BLOCK)
        for block in range(0, n, BLOCK):
            count, following = min(BLOCK, n - block), max(0, min(BLOCK, n - block - BLOCK))
            for i in range(count):
                here[i] = given[WEIGHT] + wanted[block + i] * given[STRIDE]
            for i in range(following):
                next_rows[i] = given[WEIGHT] + wanted[block + BLOCK + i] * given[STRIDE]
            for span in range(first, last):
                at_scale = scales + scale_bytes * span
                for i in range(following):
                    prefetch(next_rows[i] + 64 * span)
                if span == first or span * scale_bytes % 64 == 0:
                    for i in range(following):
                        prefetch(next_rows[i] + at_scale)
                        if has_minimum:
                            prefetch(next_rows[i] + minima - scales + at_scale)
                for t in range(rows):
                    sums = given[SUMS] + (t * spans + span) * size
                    hidden = f32_at(x + t * given[X_STRIDE])
                    total = tile_load(tokens, sums, 64)
                    for i in range(count):
                        value, row = hidden[wanted[block + i]], here[i]
                        if rows > 1 and value == float32(0):
                            continue
                        factor = splat_f32x16(value)
                        scale = mul_f32x16(load_scales(row + at_scale, lanes), factor)
                        shift = scale
                        if has_minimum:
                            shift = mul_f32x16(load_scales(row + minima - scales + at_scale, lanes), factor)
                        total = tile_add_codes(total, row + 64 * span, scale, shift)
                    tile_store(total, sums, 64)
        for t in range(rows):
            for span in range(first, last):
                _finish(given, t, thread, span, given[SUMS] + (t * spans + span) * size, bits, zero)

    return linear_t_quantized


@inline
def _finish(given, t, thread, span, sums, bits, zero):
    """Sums by (position, lane) -> y by column: position k of lane p is column 8 p + 4 (k % 2) + k // 2 of the
    span (4 bits: low nibbles are the first quad) or 4 p + k.
    """
    out = f32_at(given[OUT] + t * given[OUT_STRIDE])
    positions = 32 // bits
    total, last = f32_at(sums), f32_at(sums + 64 * positions)
    for lane in range(16):
        shift = last[lane] if zero == 0 else float32(-zero) * last[lane]
        factor = float32(1)
        for k in range(positions):
            inner = 4 * (k % 2) + k // 2 if bits == 4 else k
            column = (16 * span + lane) * positions + inner
            value = total[16 * k + lane]
            if k < positions - 1:
                value *= factor
                factor *= float32(0.0625) if bits == 4 else float32(0.00390625)
            if column < given[WIDTH]:
                out[column] = first_value(given, t, thread, column) + (value + shift)


def _float_kernel(kind: int) -> Kernel:
    width = 4 if kind == 0 else 2

    @kernel
    def linear_t_float(operands, step, first, last, thread):
        given = i64_at(operands)
        rows, listing = i64_at(step)[given[COUNT]], given[LISTING] + thread * given[LISTING_BYTES]
        x, wanted = given[X] + thread * given[X_PRIVATE], i32_at(listing)
        n = select(x, given[X_STRIDE], rows, given[FEATURES], 0, listing)
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
            for c in range(begin, end):
                out[c] = first_value(given, t, thread, c) + total[c]

    return linear_t_float
