"""The step block: what one run of a program is about, as int64 words that every kernel can read.

ROWS rows of (token, position, sequence) go in; logits come out for the WANTED ones. Buffers that a linear
reads are laid out for STRIDE rows: ROWS rounded up to whole tiles. A row count is passed to kernels as the
index of its word (ROWS or WANTED); the stride is the word behind it.
"""

from __future__ import annotations

import numpy as np

from pyinfer.jit.levels import TILES, level

ROWS, STRIDE, WANTED, WANTED_STRIDE, TOKENS, POSITIONS, SEQUENCES, WANTED_ROWS, ATTEND_ROWS = range(9)
WORDS = 9


def tile_of(rows: int) -> int:
    """Tokens that the GEMM kernels take at once for so many rows: 1, and two larger sizes (0 for none)."""
    few, many = TILES[level.get()]
    return rows if rows < 2 else few if rows <= few else many


def padded(rows: int) -> int:
    """Rows rounded up to whole tiles."""
    tile = max(1, tile_of(rows))
    return -(-rows // tile) * tile


class Step:
    """The block with the arrays it points to."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.block = np.zeros(WORDS, np.int64)
        self._rows = np.zeros((4, capacity), np.int32)
        for word, row in zip((TOKENS, POSITIONS, SEQUENCES, WANTED_ROWS), self._rows):
            self.block[word] = row.ctypes.data

    def fill(self, tokens, positions, sequences, wanted) -> None:
        """Describe a step; `wanted` are the indices of the rows whose logits are asked for."""
        n, w = len(tokens), len(wanted)
        self._rows[0, :n], self._rows[1, :n], self._rows[2, :n], self._rows[3, :w] = (
            tokens,
            positions,
            sequences,
            wanted,
        )
        block = self.block
        block[ROWS], block[STRIDE], block[WANTED], block[WANTED_STRIDE] = n, padded(n), w, padded(w)
