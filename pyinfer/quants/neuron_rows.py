"""The layout of matrices whose rows are used one by one: row after row, so that unneeded ones are never read.

A quantized row is cut into chunks of two groups of columns: codes (4-bit: byte j holds column j of the first
group low, of the second high; 8-bit: one byte per column), then two halves of scales, then two of minima if
there are. The meaning of codes, scales and minima is that of `pyinfer.quants.panels`. A float row is as in
the file.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import i64_at, u8_at, u16_at, u32_at
from pyinfer.quants.panels import (
    COLUMNS,
    PANEL_ROWS,
    PANEL_STRIDE,
    ROWS,
    SOURCE,
    TARGET,
    Layout,
)

# Operands behind those of pack kernels: the type's pack kernel, bytes of a source row, a thread's scratch.
PACK, SOURCE_ROW_BYTES, ROW_STRIDE, SCRATCH, SCRATCH_BYTES = range(5, 10)
OPERANDS = 10


def chunk_bytes(layout: Layout) -> int:
    return layout.group * layout.bits // 4 + 4 * (1 + layout.has_minimum)


def row_bytes(layout: Layout, columns: int) -> int:
    """Bytes of a row, a multiple of 4."""
    if layout.is_float:
        return columns * layout.bits // 8
    return layout.chunks(columns) * chunk_bytes(layout)


def scratch_bytes(layout: Layout, columns: int) -> int:
    """Bytes of one thread's scratch: a panel, and the operands to pack it."""
    return layout.panel_bytes(columns) + 64


@cache
def rows_from_blocks(layout: Layout) -> Kernel:
    """The kernel that unpacks a tensor into rows, 16 at a time through a panel; items are panels."""
    return _rows_kernel(layout.bits, layout.group, int(layout.has_minimum))


def _rows_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    panel_chunk = 4 * bits * group + 64 * (1 + has_minimum)
    row_chunk = group * bits // 4 + 4 * (1 + has_minimum)

    @kernel
    def unpack_rows(operands, step, first, last, thread):
        given = i64_at(operands)
        columns = given[COLUMNS]
        panel = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        pack = i64_at(panel + given[PANEL_STRIDE])
        pack[TARGET], pack[COLUMNS], pack[PANEL_STRIDE] = panel, columns, given[PANEL_STRIDE]
        for item in range(first, last):
            rows = min(PANEL_ROWS, given[ROWS] - item * PANEL_ROWS)
            pack[SOURCE] = given[SOURCE] + item * PANEL_ROWS * given[SOURCE_ROW_BYTES]
            pack[ROWS] = rows
            call_kernel(given[PACK], panel + given[PANEL_STRIDE], step, 0, 1, thread)
            for r in range(rows):
                target = given[TARGET] + (item * PANEL_ROWS + r) * given[ROW_STRIDE]
                if group == 1:
                    for c in range(columns):
                        if bits == 32:
                            u32_at(target)[c] = u32_at(panel)[c * PANEL_ROWS + r]
                        else:
                            u16_at(target)[c] = u16_at(panel)[c * PANEL_ROWS + r]
                else:
                    for chunk in range((columns + 2 * group - 1) // (2 * group)):
                        source = panel + chunk * panel_chunk
                        _unpack_chunk(source, r, target + chunk * row_chunk, bits, group, has_minimum)

    return unpack_rows


@inline
def _unpack_chunk(source, r, target, bits, group, has_minimum):
    """One row's part of a panel's chunk."""
    out = u8_at(target)
    for column in range(2 * group):
        quad = column // 4
        if bits == 4:
            code = (u8_at(source + 64 * (quad // 2))[4 * r + column % 4] >> (4 * (quad % 2))) & 15
            if column < group:
                out[column] = code
            else:
                out[column - group] |= code << 4
        else:
            out[column] = u8_at(source + 64 * quad)[4 * r + column % 4]
    halves = source + 4 * bits * group
    scales = u16_at(target + group * bits // 4)
    for k in range(2):
        scales[k] = u16_at(halves)[PANEL_ROWS * k + r]
        if has_minimum:
            scales[2 + k] = u16_at(halves)[2 * PANEL_ROWS + PANEL_ROWS * k + r]


def values(layout: Layout, raw: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns] of a matrix in rows (uint8): the definition of the layout, for tests."""
    data = raw[: rows * row_bytes(layout, columns)].reshape(rows, -1)
    if layout.is_float:
        if layout.name == "bf16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return data.view(np.float16 if layout.name == "f16" else np.float32).astype(np.float64)
    chunks = data.reshape(rows, -1, chunk_bytes(layout))
    code_bytes = layout.group * layout.bits // 4
    codes = chunks[:, :, :code_bytes]
    if layout.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], 2)
    halves = np.ascontiguousarray(chunks[:, :, code_bytes:]).view(np.float16).astype(np.float64)
    zero = 0 if layout.has_minimum else 8 if layout.bits == 4 else 128
    full = (codes - float(zero)) * halves[:, :, :2].repeat(layout.group, 2)
    if layout.has_minimum:
        full = full + halves[:, :, 2:].repeat(layout.group, 2)
    return full.reshape(rows, -1)[:, :columns]
