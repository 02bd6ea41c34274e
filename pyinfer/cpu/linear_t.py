"""y = x W (+ bias) (+ residual) for W kept row by row: each input element times its row, where it is not
zero.

A row is a neuron's output weights, so a neuron that did not fire costs nothing, not even memory. Items are
chunks of columns: every thread owns a part of y and adds in the same order, whatever the number of threads.
Each weight is converted to float32: per 16 weights a load, 1-3 integer operations, a conversion and a
multiply-add.
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
    RESIDUAL,
    RESIDUAL_PRIVATE,
    RESIDUAL_STRIDE,
    WEIGHT,
    X_PRIVATE,
    X_STRIDE,
    X,
)
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, half_to_float, i64_at, prefetch, u16_at
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_high_nibbles_f32x16,
    load_low_nibbles_f32x16,
    load_u8_f32x16,
    splat_f32x16,
    store_f32x16,
)
from pyinfer.quants.neuron_rows import chunk_bytes
from pyinfer.quants.panels import Layout

# Operands are those of `pyinfer.cpu.linear`: COLUMNS counts the inputs (rows of W), PANEL_STRIDE is from row
# to row.
FLOAT_CHUNK = 32  # columns of an item when the weights are floats


def columns_of_item(layout: Layout) -> int:
    """Columns of y that one item makes; the width of y is a multiple of it (see `pyinfer.cpu.weights`)."""
    return FLOAT_CHUNK if layout.is_float else 2 * layout.group


@cache
def linear_t(layout: Layout) -> Kernel:
    """The kernel for a layout; items are chunks of `columns_of_item` columns."""
    if layout.is_float:
        return _float_kernel(("f32", "f16", "bf16").index(layout.name))
    return _quantized_kernel(layout.bits, layout.group, int(layout.has_minimum), chunk_bytes(layout))


@inline
def _begin(given, t, thread, first_column, last_column):
    """y of a row = residual + bias, or 0; returns its address."""
    out = given[OUT] + t * given[OUT_STRIDE]
    residual = given[RESIDUAL] + t * given[RESIDUAL_STRIDE] + thread * given[RESIDUAL_PRIVATE]
    for c in range(4 * first_column, 4 * last_column, 64):
        value = splat_f32x16(float32(0))
        if given[RESIDUAL] != 0:
            value = load_f32x16(residual + c)
        if given[BIAS] != 0:
            value = add_f32x16(value, load_f32x16(given[BIAS] + c))
        store_f32x16(out + c, value)
    return out


def _quantized_kernel(bits: int, group: int, has_minimum: int, chunk: int) -> Kernel:
    zero = 0 if has_minimum else 8 if bits == 4 else 128

    @kernel
    def linear_t_quantized(operands, step, first, last, thread):
        given = i64_at(operands)
        stride = given[PANEL_STRIDE]
        for t in range(i64_at(step)[given[COUNT]]):
            x = f32_at(given[X] + t * given[X_STRIDE] + thread * given[X_PRIVATE])
            out = _begin(given, t, thread, 2 * group * first, 2 * group * last)
            for f in range(given[COLUMNS]):
                if x[f] == float32(0):
                    continue
                row = given[WEIGHT] + f * stride
                for at in range(first, last):
                    codes = row + at * chunk
                    prefetch(codes + stride)
                    halves = u16_at(codes + group * bits // 4)
                    for k in range(2):
                        y = out + 4 * group * (2 * at + k)
                        factor = half_to_float(halves[k]) * x[f]
                        offset = float32(-zero) * factor
                        if has_minimum:
                            offset = half_to_float(halves[2 + k]) * x[f]
                        scale, shift = splat_f32x16(factor), splat_f32x16(offset)
                        for i in range(0, group, 16):
                            if bits == 8:
                                code = load_u8_f32x16(codes + k * group + i)
                            elif k == 0:
                                code = load_low_nibbles_f32x16(codes + i)
                            else:
                                code = load_high_nibbles_f32x16(codes + i)
                            here = y + 4 * i
                            total = add_f32x16(load_f32x16(here), shift)
                            store_f32x16(here, fma_f32x16(code, scale, total))

    return linear_t_quantized


def _float_kernel(kind: int) -> Kernel:
    width = 4 if kind == 0 else 2

    @kernel
    def linear_t_float(operands, step, first, last, thread):
        given = i64_at(operands)
        for t in range(i64_at(step)[given[COUNT]]):
            x = f32_at(given[X] + t * given[X_STRIDE] + thread * given[X_PRIVATE])
            out = _begin(given, t, thread, FLOAT_CHUNK * first, FLOAT_CHUNK * last)
            for f in range(given[COLUMNS]):
                if x[f] == float32(0):
                    continue
                row = given[WEIGHT] + f * given[PANEL_STRIDE]
                factor = splat_f32x16(x[f])
                for c in range(FLOAT_CHUNK * first, FLOAT_CHUNK * last, 16):
                    if kind == 0:
                        weight = load_f32x16(row + width * c)
                    elif kind == 1:
                        weight = load_f16x16(row + width * c)
                    else:
                        weight = load_bf16x16(row + width * c)
                    here = out + 4 * c
                    store_f32x16(here, fma_f32x16(weight, factor, load_f32x16(here)))

    return linear_t_float
