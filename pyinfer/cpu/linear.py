"""y = W x (+ bias) (+ residual): 16 rows of W at once, for one token or a tile of them at once.

One token reads every weight once: the bound is memory, (bits / 8 + 2 / group) bytes per weight. Measured with
u4 on 2 Zen 5 cores: see docs/performance.md. Eight tokens do per group of 32 columns and token 8 vpdpbusd +
convert, multiply, fma and their share of 12 unpacking operations; two 512-bit pipes take dot, multiply and
fma, so the bound is 5 cycles for 1024 operations.
"""

from __future__ import annotations

from functools import cache

from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import i64_at, prefetch
from pyinfer.jit.simd import (
    high_nibbles,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_u8x64,
    low_nibbles,
)
from pyinfer.jit.tiles import (
    tile_add_memory,
    tile_add_product,
    tile_add_scaled,
    tile_add_vector,
    tile_dot,
    tile_splat_i32,
    tile_store,
    tile_tokens,
    tile_zero,
    tile_zero_i32,
)
from pyinfer.quants.panels import PANEL_ROWS, Layout

# Operands, int64. Strides are bytes: of a panel, of a row of a float buffer, from one thread's private copy
# to the next (0: shared).
(
    WEIGHT,
    PANEL_STRIDE,
    COLUMNS,
    COUNT,
    X,
    X_STRIDE,
    X_PRIVATE,
    OUT,
    OUT_STRIDE,
    RESIDUAL,
    RESIDUAL_STRIDE,
    RESIDUAL_PRIVATE,
    BIAS,
) = range(13)
OPERANDS = 13

TOKEN_BLOCK = 64  # tokens of x that stay in the cache while panels pass
# Prefetch distance of one-token kernels: 512 to 2048 reach 95 % of the read limit with 2 threads, 4096 91 %.
AHEAD_BYTES = 2048


def prepared_bytes(columns: int, rows: int) -> int:
    """Bytes of `rows` quantized activations: see `prepared_parts`."""
    return sum(prepared_parts(columns, rows)[1:]) + 64


def prepared_parts(columns: int, rows: int) -> tuple[int, ...]:
    """Byte sizes, after a leading 0, of the parts of quantized activations, all ordered [tile of
    rows][group][row of the tile]:

    int8 [32], float32 scale, int32 -8 sum, float32 scale * sum (per 32 columns), the two sums again per 16.
    So what one tile of the GEMM reads lies together (groups are padded to an even number); [group][row] made
    rows of a power of two fall into the same cache sets (quantize 3x slower).
    """
    groups = -(-columns // 64) * 2
    return (
        0,
        groups * rows * 32,
        groups * rows * 4,
        groups * rows * 4,
        groups * rows * 4,
        groups * rows * 8,
        groups * rows * 8,
    )


@cache
def linear(layout: Layout, tile: int) -> Kernel:
    """The kernel for a layout and a tile of tokens (`pyinfer.cpu.step.tile_of`); items are panels."""
    if layout.is_float:
        return _float_kernel(("f32", "f16", "bf16").index(layout.name), tile)
    return _quantized_kernel(layout.bits, layout.group, int(layout.has_minimum), tile)


@inline
def _finish(given, total, t, panel, thread):
    """Add bias and residual, if there are, and write the tile."""
    if given[BIAS] != 0:
        total = tile_add_vector(total, load_f32x16(given[BIAS] + 64 * panel))
    if given[RESIDUAL] != 0:
        residual = given[RESIDUAL] + thread * given[RESIDUAL_PRIVATE]
        here = residual + t * given[RESIDUAL_STRIDE] + 64 * panel
        total = tile_add_memory(total, here, given[RESIDUAL_STRIDE])
    tile_store(total, given[OUT] + t * given[OUT_STRIDE] + 64 * panel, given[OUT_STRIDE])


@inline
def activation_parts(given, stride, thread, group):
    """Addresses of quantized activations, of their scales, sums and scaled sums (see `prepared_parts`)."""
    columns = 64 * ((given[COLUMNS] + 63) // 64)
    x = given[X] + thread * given[X_PRIVATE]
    part = columns // 32 * stride * 4
    x_scale = x + columns * stride
    if group == 16:
        return x, x_scale, x_scale + 3 * part, x_scale + 5 * part
    return x, x_scale, x_scale + part, x_scale + 2 * part


@inline
def add_chunk(total, codes, scales, x, g, bits, group, has_minimum):
    """total += one chunk of a panel (its codes and its scales) times groups g and g + 1 of a tile of x.

    x: the four addresses of `activation_parts`, for this tile.
    """
    tile, halves = tile_tokens(total), 32 // group
    for half in range(2):
        at_sum = 4 * (g + half) * tile
        if has_minimum:
            acc = tile_zero_i32(total)
        elif bits == 4:
            acc = tile_splat_i32(total, x[2] + at_sum, 0)
        else:
            acc = tile_splat_i32(total, x[2] + at_sum, 4)
        xg = x[0] + 32 * tile * ((g + half) // halves) + (g + half) % halves * group
        at = codes + half * 2 * bits * group
        if bits == 4:
            for c in range(group // 8):
                pair = load_u8x64(at + 64 * c)
                acc = tile_dot(acc, low_nibbles(pair), xg + 8 * c, 0)
                acc = tile_dot(acc, high_nibbles(pair), xg + 8 * c + 4, 0)
        else:
            for c in range(group // 4):
                acc = tile_dot(acc, load_u8x64(at + 64 * c), xg + 4 * c, 1)
        scale = load_f16x16(scales + 32 * half)
        total = tile_add_scaled(total, acc, scale, x[1] + 4 * tile * ((g + half) // halves))
        if has_minimum:
            total = tile_add_product(total, load_f16x16(scales + 64 + 32 * half), x[3] + at_sum, 4)
    return total


def _quantized_kernel(bits: int, group: int, has_minimum: int, tile: int) -> Kernel:
    group_bytes = 2 * bits * group
    chunk_bytes = 2 * group_bytes + 64 * (1 + has_minimum)

    @kernel
    def linear_quantized(operands, step, first, last, thread):
        given = i64_at(operands)
        words = i64_at(step)
        rows, stride = words[given[COUNT]], words[given[COUNT] + 1]
        chunks = (given[COLUMNS] + 2 * group - 1) // (2 * group)
        columns = 64 * ((given[COLUMNS] + 63) // 64)
        x, x_scale, sums, sums_scaled = activation_parts(given, stride, thread, group)
        for block in range(0, rows, TOKEN_BLOCK):
            for panel in range(first, last):
                weight = given[WEIGHT] + panel * given[PANEL_STRIDE]
                for t in range(block, min(block + TOKEN_BLOCK, rows), tile):
                    total, sum_tile = tile_zero(tile), t * columns // group * 4
                    parts = (
                        x + t * columns,
                        x_scale + t * columns // 8,
                        sums + sum_tile,
                        sums_scaled + sum_tile,
                    )
                    for chunk in range(chunks):
                        at = weight + chunk * chunk_bytes
                        if tile == 1:
                            for c in range(chunk_bytes // 64):
                                prefetch(at + AHEAD_BYTES + 64 * c)
                        scales = at + 2 * group_bytes
                        total = add_chunk(total, at, scales, parts, 2 * chunk, bits, group, has_minimum)
                    _finish(given, total, t, panel, thread)

    return linear_quantized


def _float_kernel(kind: int, tile: int) -> Kernel:
    column_bytes = PANEL_ROWS * (4 if kind == 0 else 2)

    @kernel
    def linear_float(operands, step, first, last, thread):
        given = i64_at(operands)
        rows = i64_at(step)[given[COUNT]]
        x, x_stride = given[X] + thread * given[X_PRIVATE], given[X_STRIDE]
        for block in range(0, rows, TOKEN_BLOCK):
            for panel in range(first, last):
                weight = given[WEIGHT] + panel * given[PANEL_STRIDE]
                for t in range(block, min(block + TOKEN_BLOCK, rows), tile):
                    total = tile_zero(tile)
                    here = x + t * x_stride
                    for c in range(given[COLUMNS]):
                        if kind == 0:
                            column = load_f32x16(weight + c * column_bytes)
                        elif kind == 1:
                            column = load_f16x16(weight + c * column_bytes)
                        else:
                            column = load_bf16x16(weight + c * column_bytes)
                        total = tile_add_product(total, column, here + 4 * c, x_stride)
                    _finish(given, total, t, panel, thread)

    return linear_float
