"""Rows of a neuron-major matrix, wherever they lie, as a panel; and lists of the neurons that are wanted."""

from __future__ import annotations

from numpy import float32

from pyinfer.jit.codes import above_bits, list_bits, nonzero_bits, reaching_bits
from pyinfer.jit.kernel import inline
from pyinfer.jit.memory import f32_at, i32_at, i64_at, prefetch
from pyinfer.jit.transpose import transpose_pairs, transpose_words
from pyinfer.quants.neuron_rows import BLOCK
from pyinfer.quants.panels import PANEL_ROWS, Layout

NOT_ZERO, REACHING, ABOVE = range(3)  # what a mask asks for


def gathered_bytes(layout: Layout, columns: int) -> int:
    """Bytes of a panel with room for whole blocks of words."""
    if layout.is_float:
        return -(-columns // 64) * 64 * layout.bits // 8 * PANEL_ROWS
    chunks = -(-layout.chunks(columns) // BLOCK) * BLOCK
    return chunks * layout.chunk_bytes


@inline
def point_rows(table, listing, at, last, weight, stride):
    """Write the addresses of 16 rows, those of listing[at:at + 16]; behind `last` its row again."""
    pointers, wanted = i64_at(table), i32_at(listing)
    for r in range(PANEL_ROWS):
        pointers[r] = weight + wanted[min(at + r, last)] * stride


@inline
def prefetch_rows(table, offset):
    """Ask for a line of each of the 16 rows in a table; none if it is 0."""
    if table != 0:
        pointers = i64_at(table)
        for r in range(PANEL_ROWS):
            prefetch(pointers[r] + offset)


@inline
def gather_codes(table, codes, chunk_bytes, blocks, together):
    """Rows at the 16 addresses in `table` -> a panel's codes, `together` words a chunk."""
    for block in range(blocks):
        here = codes + block * (16 // together) * chunk_bytes
        transpose_words(table, 64 * block, here, together, chunk_bytes)


@inline
def gather_scales(table, ahead, scales, chunk_bytes, blocks, chunks, has_minimum):
    """The rows' scales and minima, which stand behind `blocks` of codes -> chunk_bytes from chunk to chunk.

    Asks for the same lines of the rows in `ahead`.
    """
    for part in range(1 + has_minimum):
        for block in range((chunks + 15) // 16):
            prefetch_rows(ahead, 64 * blocks)
            transpose_pairs(table, 64 * blocks, scales + 64 * part + 16 * block * chunk_bytes, chunk_bytes)
            blocks += 1


@inline
def code_blocks(columns, bits, group):
    """Blocks of 16 words of codes of a row."""
    return ((columns + 2 * group - 1) // (2 * group) * (group * bits // 16) + 15) // 16


@inline
def gather_floats(table, ahead, panel, columns, bits):
    """Rows of floats -> a panel, [columns][16]. Asks for the same lines of the rows in `ahead`."""
    for block in range((columns + 63) // 64 * bits // 8):
        prefetch_rows(ahead, 64 * block)
        if bits == 32:
            transpose_words(table, 64 * block, panel + 1024 * block, 16, 1024)
        else:
            transpose_pairs(table, 64 * block, panel + 1024 * block, 64)


@inline
def select(mask, stride, rows, width, rule, bound, listing):
    """Which of `width` neurons at least one of the rows asks for; returns how many. Rows have room for 16
    more.

    rule : NOT_ZERO, REACHING (bound: address of a threshold for each neuron) or ABOVE (of one number)
    """
    count = 0
    least = f32_at(bound)[0] if rule == ABOVE else float32(0)
    for f in range(0, width, 16):
        bits = 0
        for t in range(rows):
            here = mask + t * stride + 4 * f
            if rule == REACHING:
                bits |= reaching_bits(here, bound + 4 * f)
            elif rule == ABOVE:
                bits |= above_bits(here, least)
            else:
                bits |= nonzero_bits(here)
        if width - f < 16:
            bits &= (1 << (width - f)) - 1
        if bits != 0:
            count += list_bits(bits, f, listing + 4 * count)
    return count
