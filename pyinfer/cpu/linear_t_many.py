"""y = x W for W kept row by row and many rows of x: a GEMM, for which W is turned into panels on the way.

In a quantized W every neuron has scales of its own, which an integer product along the neurons cannot have.
So SLAB neurons at a time, for a span of columns, are quantized again: to 8 bits, with a scale per column and
32 neurons, finer than the 4 bits by far. By count that is 0.7 operations a weight, once per chunk of tokens;
measured, a layer whose up and down become panels on the way takes 4 % longer for 256 tokens. The panels hold
the columns of a span by position in the word; sums go to a buffer in that order, and `finish` sorts them.

A float W needs only its columns copied together.
"""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.linear import BIAS as INNER_BIAS
from pyinfer.cpu.linear import COLUMNS as INNER_COLUMNS
from pyinfer.cpu.linear import OUT as INNER_OUT
from pyinfer.cpu.linear import PANEL_STRIDE as INNER_STRIDE
from pyinfer.cpu.linear import RESIDUAL as INNER_RESIDUAL
from pyinfer.cpu.linear_at import INNER_BYTES
from pyinfer.cpu.linear_t import BIAS, OUT, RESIDUAL, STRIDE, SUMS, WEIGHT, WIDTH, finish_span
from pyinfer.cpu.linear_t import OPERANDS as T_OPERANDS
from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.codes import load_scales, store_code_scale, store_quad, tile_codes, tile_largest
from pyinfer.jit.kernel import Kernel, kernel
from pyinfer.jit.memory import i64_at, u16_at, u32_at
from pyinfer.jit.simd import load_f32x16, mul_f32x16, splat_f32x16
from pyinfer.jit.tiles import tile_load, tile_store, tile_zero
from pyinfer.quants.panels import PANEL_ROWS, U8, Layout

# Operands behind those of `pyinfer.cpu.linear_t`: the linear kernel and each thread's operands of it; a
# thread's scratch, with what panels are made of at VALUES and the panels at PANELS; the neurons of this slab.
# LINEAR, INNER, SCRATCH and SCRATCH_BYTES follow each other as in `pyinfer.cpu.linear_at`.
LINEAR, INNER, SCRATCH, SCRATCH_BYTES, VALUES, PANELS, FIRST, NEURONS, SUM_STRIDE = range(
    T_OPERANDS, T_OPERANDS + 9
)
OPERANDS = T_OPERANDS + 9

SLAB = 1024  # neurons: 8 panels of 17 KiB stay in the L2 cache
GROUP = 32


def values_bytes(layout: Layout) -> int:
    """Bytes of the float32 of GROUP neurons of a span, and of the largest ones."""
    return 64 * (GROUP + 1) * (32 // layout.bits)


def panels_bytes(layout: Layout) -> int:
    """Bytes of the panels of a slab and span."""
    return U8.panel_bytes(SLAB) * (32 // layout.bits)


@cache
def slab(layout: Layout) -> Kernel:
    """sums += x of a slab times its rows; items are spans."""
    return _slab_kernel(layout.bits, layout.group, int(layout.has_minimum))


@cache
def finish(layout: Layout) -> Kernel:
    """y = sums + residual + bias, columns sorted; items are rows."""
    return _finish_kernel(layout.bits)


@cache
def columns(layout: Layout) -> Kernel:
    """y of a float W at once; items are panels of 16 columns."""
    return _columns_kernel(layout.bits)


def _slab_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    together = group * bits // 16
    lanes = together // 2
    scale_bytes = 64 // together
    zero = 0 if has_minimum else 8 if bits == 4 else 128
    chunk_bytes = U8.chunk_bytes
    group_bytes = 2 * U8.bits * U8.group

    @kernel
    def linear_t_slab(operands, step, first, last, thread):
        given = i64_at(operands)
        scratch = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        arguments = given[INNER] + thread * INNER_BYTES
        inner, values, panels = i64_at(arguments), scratch + given[VALUES], scratch + given[PANELS]
        chunks = (given[WIDTH] + 2 * group - 1) // (2 * group)
        scales = (chunks * together + 15) // 16 * 64
        minima = scales + (chunks + 15) // 16 * 64
        neurons = given[NEURONS]
        panel_bytes = (neurons + 63) // 64 * chunk_bytes
        for span in range(first, last):
            for g in range(0, (neurons + 63) // 64 * 2):
                largest = tile_zero(positions)
                target = panels + g // 2 * chunk_bytes + g % 2 * group_bytes
                at_scale = panels + g // 2 * chunk_bytes + 2 * group_bytes + g % 2 * 32
                for i in range(GROUP):
                    f = GROUP * g + i
                    here = values + 64 * i
                    if f >= neurons:
                        tile_store(tile_zero(positions), here, 64 * GROUP)
                        continue
                    row = given[WEIGHT] + (given[FIRST] + f) * given[STRIDE]
                    scale = load_scales(row + scales + scale_bytes * span, lanes)
                    if has_minimum:
                        shift = load_scales(row + minima + scale_bytes * span, lanes)
                    else:
                        shift = mul_f32x16(scale, splat_f32x16(float32(-zero)))
                    weights = tile_codes(positions, row + 64 * span, scale, shift)
                    largest = tile_largest(largest, weights)
                    tile_store(weights, here, 64 * GROUP)
                tile_store(largest, values + 64 * GROUP * positions, 64)
                for k in range(positions):
                    most = load_f32x16(values + 64 * (GROUP * positions + k))
                    inverse = store_code_scale(most, at_scale + k * panel_bytes)
                    for quad in range(GROUP // 4):
                        source = values + 64 * (GROUP * k + 4 * quad)
                        store_quad(source, target + k * panel_bytes + 64 * quad, 64, inverse)
            inner[INNER_COLUMNS], inner[INNER_STRIDE] = neurons, panel_bytes
            inner[INNER_OUT] = given[SUMS] + 64 * positions * span
            inner[INNER_RESIDUAL] = inner[INNER_OUT] if given[FIRST] > 0 else 0
            call_kernel(given[LINEAR], arguments, step, 0, positions, thread)

    return linear_t_slab


def _finish_kernel(bits: int) -> Kernel:
    positions = 32 // bits

    @kernel
    def linear_t_finish(operands, step, first, last, thread):
        given = i64_at(operands)
        for row in range(first, last):
            sums = given[SUMS] + row * given[SUM_STRIDE]
            for span in range((given[WIDTH] + 16 * positions - 1) // (16 * positions)):
                here = sums + 64 * positions * span
                finish_span(given, row, thread, span, tile_load(positions, here, 64), here)

    return linear_t_finish


def _columns_kernel(bits: int) -> Kernel:
    @kernel
    def linear_t_columns(operands, step, first, last, thread):
        given = i64_at(operands)
        arguments = given[INNER] + thread * INNER_BYTES
        inner = i64_at(arguments)
        panel = given[SCRATCH] + thread * given[SCRATCH_BYTES] + given[PANELS]
        for item in range(first, last):
            for f in range(given[NEURONS]):
                row = given[WEIGHT] + f * given[STRIDE] + PANEL_ROWS * item * bits // 8
                for c in range(PANEL_ROWS):
                    if bits == 32:
                        u32_at(panel)[PANEL_ROWS * f + c] = u32_at(row)[c]
                    else:
                        u16_at(panel)[PANEL_ROWS * f + c] = u16_at(row)[c]
            inner[INNER_OUT] = given[OUT] + 4 * PANEL_ROWS * item
            if given[BIAS] != 0:
                inner[INNER_BIAS] = given[BIAS] + 4 * PANEL_ROWS * item
            if given[RESIDUAL] != 0:
                inner[INNER_RESIDUAL] = given[RESIDUAL] + 4 * PANEL_ROWS * item
            call_kernel(given[LINEAR], arguments, step, 0, 1, thread)

    return linear_t_columns
