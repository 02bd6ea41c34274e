"""Rows of matrices that stay in the file: token embeddings, learned positions.

A row is packed into a panel, as the loader packs matrices, and read back from there; so every tensor type
works.
"""

from __future__ import annotations

from functools import cache

from numpy import float32, uint32

from pyinfer.cpu.rows import (
    DATA,
    IN,
    OFFSET,
    OUT,
    PACK,
    PANEL,
    PANEL_BYTES,
    ROW_BYTES,
    SCALE,
    WIDTH,
    row_at,
)
from pyinfer.cpu.step import POSITIONS, TOKENS
from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import bits_to_float, f32_at, half_to_float, i32_at, i64_at, u16_at
from pyinfer.quants import panels
from pyinfer.quants.panels import PANEL_ROWS, Layout


@cache
def embed(layout: Layout) -> Kernel:
    """out = scale * the token's row of the matrix. Items are rows."""
    return _embed_kernel(*_shape(layout), False)


@cache
def embed_position(layout: Layout) -> Kernel:
    """out = x + scale * the matrix's row of the position, OFFSET rows further down. Items are rows."""
    return _embed_kernel(*_shape(layout), True)


def _shape(layout: Layout) -> tuple[int, int, int, int]:
    kind = 1 + ("f32", "f16", "bf16").index(layout.name) if layout.is_float else 0
    return kind, layout.bits, layout.group, int(layout.has_minimum)


def _embed_kernel(kind: int, bits: int, group: int, has_minimum: int, by_position: bool) -> Kernel:
    zero = 0 if has_minimum else 8 if bits == 4 else 128

    @kernel
    def embed_rows(operands, step, first, last, thread):
        given, words = i64_at(operands), i64_at(step)
        which = i32_at(words[POSITIONS]) if by_position else i32_at(words[TOKENS])
        columns, scale = given[WIDTH], f32_at(given[SCALE])[0]
        panel = given[PANEL] + thread * (given[PANEL_BYTES] + 64)
        pack = i64_at(panel + given[PANEL_BYTES])
        pack[panels.TARGET], pack[panels.ROWS] = panel, 1
        pack[panels.COLUMNS], pack[panels.PANEL_STRIDE] = columns, given[PANEL_BYTES]
        for row in range(first, last):
            pack[panels.SOURCE] = given[DATA] + (which[row] + given[OFFSET]) * given[ROW_BYTES]
            call_kernel(given[PACK], panel + given[PANEL_BYTES], step, 0, 1, thread)
            x, out = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, OUT, row, thread))
            for c in range(columns):
                if kind == 0:
                    value = scale * _coded(panel, c, bits, group, zero, has_minimum)
                else:
                    value = scale * _float_of(kind, panel, c * PANEL_ROWS)
                out[c] = x[c] + value if by_position else value

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
