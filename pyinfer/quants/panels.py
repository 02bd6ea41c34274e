"""The runtime layouts: what every GGUF tensor type is unpacked to, so that kernels are few and types are
many.

A matrix [rows, columns] is cut into *panels* of 16 rows, and a quantized panel into *chunks* of two groups of
columns. A chunk holds

    codes   group by group, per pair of quads (2 x 4 columns) 64 bytes: row r's four codes at bytes 4r..4r+3;
    8-bit codes take 64 bytes
            per quad, 4-bit codes share them: the first quad in the low nibbles, the second in the high ones
    scales  2 x 16 halves: group by group, row by row
    minima  2 x 16 halves, when the layout has them

    value = scale * (code - zero) + minimum        zero: 8 for 4 bits, 128 for 8 bits, 0 with a minimum

So one 64-byte load times four activations in all lanes is a step for 16 rows at once (one vpdpbusd), for one
token or many, and a panel is one stream of whole cache lines (scales apart from codes: 22 instead of 30 GB/s
per thread). A float panel is [columns][16] numbers. Rows are padded with zeros to 16, groups to an even
number; panels begin at multiples of 64 bytes.

K-quants multiply a half by a 4 to 8 bit integer to get the scale of a group, and some also its minimum; here
each product is rounded to a half, by at most 2^-11 of itself. That holds below 2^-14, too, where halves have
fewer bits: a half times an integer is a multiple of 2^-24, as all halves are, so nothing is rounded there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyinfer.jit.kernel import inline
from pyinfer.jit.memory import float_to_half, i64_at, load_u16, load_u32, u16_at, u32_at

PANEL_ROWS = 16


@dataclass(frozen=True)
class Layout:
    """How one matrix lies in memory. bits 4 or 8 with groups of 16 or 32 columns; or a float kind."""

    name: str
    bits: int
    group: int = 1
    has_minimum: bool = False

    @property
    def is_float(self) -> bool:
        return self.group == 1

    @property
    def chunk_bytes(self) -> int:
        return 4 * self.bits * self.group + 64 * (1 + self.has_minimum)

    def chunks(self, columns: int) -> int:
        return -(-columns // (2 * self.group))

    def panel_bytes(self, columns: int) -> int:
        """Bytes from one panel to the next."""
        if self.is_float:
            return (columns * PANEL_ROWS * self.bits // 8 + 63) // 64 * 64
        return self.chunks(columns) * self.chunk_bytes

    def matrix_bytes(self, rows: int, columns: int) -> int:
        return panels_of(rows) * self.panel_bytes(columns)


U4 = Layout("u4", 4, 32)
U4M = Layout("u4m", 4, 32, True)
U4G16 = Layout("u4g16", 4, 16)
U4MG16 = Layout("u4mg16", 4, 16, True)
U8 = Layout("u8", 8, 32)
U8M = Layout("u8m", 8, 32, True)
U8G16 = Layout("u8g16", 8, 16)
F16 = Layout("f16", 16)
BF16 = Layout("bf16", 16)
F32 = Layout("f32", 32)


def panels_of(rows: int) -> int:
    return -(-rows // PANEL_ROWS)


# Operands of every pack kernel (int64): where the source and the panels lie, and the shape.
SOURCE, TARGET, ROWS, COLUMNS, PANEL_STRIDE = range(5)
OPERANDS = 5


@inline
def pack_codes(quad, scale, minimum, shape, operands, first, last):
    """Panels [first, last) of a quantized type, from three functions of its file; shape = (block,
    block_bytes, bits, group).

    quad(block, i) -> the codes of elements 4 i .. 4 i + 3, one per byte; scale(block, g) and minimum(block,
    g) -> float32 of group g; minimum may be None.
    """
    block, block_bytes, bits, group = shape
    given = i64_at(operands)
    rows, columns = given[ROWS], given[COLUMNS]
    row_bytes = columns // block * block_bytes
    group_bytes = 2 * bits * group
    chunk_bytes = 2 * group_bytes + (64 if minimum is None else 128)
    groups = block // group
    for panel in range(first, last):
        target = given[TARGET] + panel * given[PANEL_STRIDE]
        row0 = given[SOURCE] + panel * PANEL_ROWS * row_bytes
        for b in range(
            columns // block
        ):  # all rows of a block before the next: what is written stays in the L1 cache
            for r in range(min(PANEL_ROWS, rows - panel * PANEL_ROWS)):
                source = row0 + r * row_bytes + b * block_bytes
                for g in range(groups):
                    at = b * groups + g
                    chunk = target + at // 2 * chunk_bytes
                    _pack_group(quad, source, g, bits, group, chunk + at % 2 * group_bytes + 4 * r)
                    halves = u16_at(chunk + 2 * group_bytes + 32 * (at % 2))
                    halves[r] = float_to_half(scale(source, g))
                    if minimum is not None:
                        halves[32 + r] = float_to_half(minimum(source, g))


@inline
def _pack_group(quad, source, g, bits, group, target):
    quads = group // 4
    if bits == 4:
        for c in range(quads // 2):
            low = quad(source, g * quads + 2 * c)
            high = quad(source, g * quads + 2 * c + 1)
            u32_at(target + 64 * c)[0] = low | (high << 4)
    else:
        for c in range(quads):
            u32_at(target + 64 * c)[0] = quad(source, g * quads + c)


@inline
def pack_floats(bits, operands, first, last):
    """Panels [first, last) of a float type: a transposition of 16 rows."""
    given = i64_at(operands)
    rows, columns = given[ROWS], given[COLUMNS]
    for panel in range(first, last):
        target = given[TARGET] + panel * given[PANEL_STRIDE]
        for r in range(min(PANEL_ROWS, rows - panel * PANEL_ROWS)):
            source = given[SOURCE] + (panel * PANEL_ROWS + r) * columns * (bits // 8)
            for c in range(columns):
                if bits == 32:
                    u32_at(target)[c * PANEL_ROWS + r] = load_u32(source + 4 * c)
                else:
                    u16_at(target)[c * PANEL_ROWS + r] = load_u16(source + 2 * c)


def values(layout: Layout, panels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns] of a matrix in panels (uint8): the definition of a layout, for the reference
    and tests.
    """
    count = panels_of(rows)
    panel = panels.reshape(count, layout.panel_bytes(columns))
    if layout.is_float:
        raw = panel[:, : columns * PANEL_ROWS * layout.bits // 8].reshape(-1)
        if layout.name == "bf16":
            flat = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            flat = raw.view(np.float16 if layout.name == "f16" else np.float32)
        full = flat.reshape(count, columns, PANEL_ROWS).transpose(0, 2, 1)
    else:
        chunks = panel.reshape(count, -1, layout.chunk_bytes)
        code_bytes = 4 * layout.bits * layout.group
        codes = chunks[:, :, :code_bytes].reshape(count, -1, 64)
        if layout.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], 2)
        codes = codes.reshape(count, -1, layout.group // 4, PANEL_ROWS, 4).transpose(0, 3, 1, 2, 4)
        codes = codes.reshape(count, PANEL_ROWS, -1, layout.group).astype(np.float64)

        def halves(start):
            part = np.ascontiguousarray(chunks[:, :, start : start + 64]).view(np.float16)
            return part.reshape(count, -1, PANEL_ROWS, 1).transpose(0, 2, 1, 3).astype(np.float64)

        zero = 0 if layout.has_minimum else 8 if layout.bits == 4 else 128
        full = (codes - zero) * halves(code_bytes)
        if layout.has_minimum:
            full = full + halves(code_bytes + 64)
        full = full.reshape(count, PANEL_ROWS, -1)[:, :, :columns]
    return full.reshape(count * PANEL_ROWS, columns)[:rows].astype(np.float64)
