"""The layout of matrices whose rows are used one by one: row after row, so that unneeded ones are never read.

A quantized row holds the *words* (32 bits) that are its own in a panel, in the same order: all words of
codes, then one word per chunk with its two scales (the first group's in the low half), then such words of
minima if there are. Each of these parts is padded with zeros to 16 words, so that 16 rows become a panel by
transposing blocks of 16 x 16 words (`pyinfer.cpu.gather`), and any 16 neurons can be one. The meaning of
codes, scales and minima is that of `pyinfer.quants.panels`. A float row is as in the file, padded to 64
columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, kernel
from pyinfer.jit.memory import i64_at, u16_at, u32_at
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
BLOCK = 16  # words of a row that are moved at once
FLOAT_BLOCK = 64  # columns


def chunk_words(layout: Layout) -> int:
    """Words of codes that a row has in one chunk of a panel (two groups)."""
    return layout.group * layout.bits // 16


def code_words(layout: Layout, columns: int) -> int:
    """Words of codes of a row, padded."""
    return -(-layout.chunks(columns) * chunk_words(layout) // BLOCK) * BLOCK


def scale_words(layout: Layout, columns: int) -> int:
    """Words of scales of a row (and of minima), padded."""
    return -(-layout.chunks(columns) // BLOCK) * BLOCK


def row_bytes(layout: Layout, columns: int) -> int:
    """Bytes of a row, a multiple of 64."""
    if layout.is_float:
        return -(-columns // FLOAT_BLOCK) * FLOAT_BLOCK * layout.bits // 8
    parts = 1 + layout.has_minimum
    return 4 * (code_words(layout, columns) + parts * scale_words(layout, columns))


def scratch_bytes(layout: Layout, columns: int) -> int:
    """Bytes of one thread's scratch: a panel, and the operands to pack it."""
    return layout.panel_bytes(columns) + 64


@cache
def rows_from_blocks(layout: Layout) -> Kernel:
    """The kernel that unpacks a tensor into rows, 16 at a time through a panel; items are panels."""
    return _rows_kernel(layout.bits, layout.group, int(layout.has_minimum))


def _rows_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    together = group * bits // 16
    group_bytes = 2 * bits * group
    chunk_bytes = 2 * group_bytes + 64 * (1 + has_minimum)

    @kernel
    def unpack_rows(operands, step, first, last, thread):
        given = i64_at(operands)
        columns = given[COLUMNS]
        panel = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        pack = i64_at(panel + given[PANEL_STRIDE])
        pack[TARGET], pack[COLUMNS], pack[PANEL_STRIDE] = panel, columns, given[PANEL_STRIDE]
        chunks = (columns + 2 * group - 1) // (2 * group)
        codes = (chunks * together + 15) // 16 * 16
        scales = (chunks + 15) // 16 * 16
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
                    words, halves = u32_at(target), u16_at(target + 4 * codes)
                    minima = u16_at(target + 4 * (codes + scales))
                    for chunk in range(chunks):
                        source = panel + chunk * chunk_bytes
                        for w in range(together):
                            words[chunk * together + w] = u32_at(source + 64 * w)[r]
                        for k in range(2):
                            at = u16_at(source + 2 * group_bytes + 32 * k)
                            halves[2 * chunk + k] = at[r]
                            if has_minimum:
                                minima[2 * chunk + k] = at[2 * PANEL_ROWS + r]

    return unpack_rows


def values(layout: Layout, raw: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns] of a matrix in rows (uint8): the definition of the layout, for tests."""
    data = raw[: rows * row_bytes(layout, columns)].reshape(rows, -1)
    if layout.is_float:
        if layout.name == "bf16":
            full = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            full = data.view(np.float16 if layout.name == "f16" else np.float32)
        return full[:, :columns].astype(np.float64)
    chunks = layout.chunks(columns)
    words = np.ascontiguousarray(data[:, : 4 * chunks * chunk_words(layout)])
    if layout.bits == 4:  # a word is two quads: low nibbles, high nibbles
        quads = words.reshape(rows, -1, 1, 4)
        codes = np.concatenate([quads & 15, quads >> 4], 2).reshape(rows, -1)
    else:
        codes = words
    halves = np.ascontiguousarray(data[:, 4 * code_words(layout, columns) :]).view(np.float16)
    groups = halves.astype(np.float64).reshape(rows, 1 + layout.has_minimum, -1)[:, :, : 2 * chunks]
    zero = 0 if layout.has_minimum else 8 if layout.bits == 4 else 128
    full = (codes - float(zero)) * groups[:, 0].repeat(layout.group, 1)
    if layout.has_minimum:
        full = full + groups[:, 1].repeat(layout.group, 1)
    return full[:, :columns]
