"""The layout of matrices whose columns are used one by one: where x is zero, a column is never read.

The columns of a group (those that share a scale in the file) follow each other, and behind them stand the
group's scales, one half per output, and such minima if there are. A column is lines of 64 bytes, of 128 or
64 outputs. Byte 16 q + 4 i + w of a line is output 16 i + 4 q + w of it, and a high nibble the 64th behind
the low one: so that four columns, interleaved byte by byte within quarters, are vectors of 16 neighbouring
outputs (`pyinfer.jit.columns`). Outputs are padded with zeros to whole lines. The meaning of codes, scales
and minima is that of `pyinfer.quants.panels`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pyinfer.jit.atomics import call_kernel
from pyinfer.jit.kernel import Kernel, kernel
from pyinfer.jit.memory import i64_at, u8_at, u16_at
from pyinfer.quants.neuron_rows import PACK, SCRATCH, SCRATCH_BYTES, SOURCE_ROW_BYTES
from pyinfer.quants.panels import (
    COLUMNS,
    PANEL_ROWS,
    PANEL_STRIDE,
    ROWS,
    SOURCE,
    TARGET,
    Layout,
)


def line_outputs(layout: Layout) -> int:
    """Outputs that one line of a column holds."""
    return PANEL_ROWS * 32 // layout.bits


def lines_of(layout: Layout, rows: int) -> int:
    return -(-rows // line_outputs(layout))


def group_bytes(layout: Layout, rows: int) -> int:
    """Bytes from one group of columns to the next."""
    lines = lines_of(layout, rows)
    return lines * (64 * layout.group + 2 * line_outputs(layout) * (1 + layout.has_minimum))


@cache
def columns_from_blocks(layout: Layout) -> Kernel:
    """The kernel that unpacks a tensor into columns, through panels; items are lines. Operands are those of
    `pyinfer.quants.neuron_rows`, and the target is zeros.
    """
    return _columns_kernel(layout.bits, layout.group, int(layout.has_minimum))


def _columns_kernel(bits: int, group: int, has_minimum: int) -> Kernel:
    positions = 32 // bits
    panel_group = 2 * bits * group
    chunk_bytes = 2 * panel_group + 64 * (1 + has_minimum)

    @kernel
    def unpack_columns(operands, step, first, last, thread):
        given = i64_at(operands)
        lines = (given[ROWS] + PANEL_ROWS * positions - 1) // (PANEL_ROWS * positions)
        scales_bytes = 2 * PANEL_ROWS * positions * lines
        panel = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        pack = i64_at(panel + given[PANEL_STRIDE])
        pack[TARGET], pack[COLUMNS], pack[PANEL_STRIDE] = panel, given[COLUMNS], given[PANEL_STRIDE]
        for item in range(first * positions, min(last * positions, (given[ROWS] + 15) // 16)):
            rows = min(PANEL_ROWS, given[ROWS] - item * PANEL_ROWS)
            pack[SOURCE] = given[SOURCE] + item * PANEL_ROWS * given[SOURCE_ROW_BYTES]
            pack[ROWS] = rows
            call_kernel(given[PACK], panel + given[PANEL_STRIDE], step, 0, 1, thread)
            line, part = item // positions, item % positions
            for g in range(given[COLUMNS] // group):
                target = given[TARGET] + g * (lines * 64 * group + (1 + has_minimum) * scales_bytes)
                source = panel + g // 2 * chunk_bytes
                codes = u8_at(source + g % 2 * panel_group)
                for c in range(group):
                    out = u8_at(target + 64 * (c * lines + line) + part % 4 * 4)
                    at = c // 8 * 64 + c % 4 if bits == 4 else c // 4 * 64 + c % 4
                    for r in range(rows):
                        code = codes[at + 4 * r]
                        if bits == 4:
                            code = ((code >> (c % 8 // 4 * 4)) & 15) << (part // 4 * 4)
                        out[r // 4 * 16 + r % 4] |= code
                for kind in range(1 + has_minimum):
                    halves = u16_at(source + 2 * panel_group + 64 * kind + 32 * (g % 2))
                    out16 = u16_at(target + 64 * group * lines + kind * scales_bytes + 32 * item)
                    for r in range(rows):
                        out16[r] = halves[r]

    return unpack_columns


def values(layout: Layout, raw: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns] of a matrix in columns (uint8): the definition of the layout, for tests."""
    lines, each = lines_of(layout, rows), line_outputs(layout)
    groups = raw[: columns // layout.group * group_bytes(layout, rows)].reshape(columns // layout.group, -1)
    n_bytes = 64 * lines * layout.group
    found = groups[:, :n_bytes].reshape(-1, layout.group, lines, 1, 4, 4, 4)  # quarter, i, w
    if layout.bits == 4:
        found = np.concatenate([found & 15, found >> 4], 3)
    codes = found.swapaxes(4, 5).reshape(len(groups), layout.group, lines * each)
    halves = np.ascontiguousarray(groups[:, n_bytes:]).view(np.float16).astype(np.float64)
    halves = halves.reshape(len(groups), 1 + layout.has_minimum, 1, lines * each)
    zero = 0 if layout.has_minimum else 8 if layout.bits == 4 else 128
    full = (codes - float(zero)) * halves[:, 0] + (halves[:, 1] if layout.has_minimum else 0)
    return full.reshape(columns, -1).T[:rows]
