"""Words that turn 16 rows into columns: 16 x 16 words of 32 bits, by 64 shuffles of two registers.

The rows lie anywhere: their addresses are 16 int64 in memory. Bound: 64 shuffles for 1024 bytes; two 512-bit
shuffles a cycle are 32 bytes a cycle, far above what memory gives.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.llvm import I16, I64, LANES, constant, i32x16, load, shuffle, store, word


def _pairs(builder, vectors, distance, lanes_low, lanes_high):
    """Replace vectors i and i + distance by two shuffles of them, for every i."""
    out = list(vectors)
    for i in range(len(vectors)):
        if not i & distance:
            a, b = vectors[i], vectors[i + distance]
            out[i] = shuffle(builder, a, b, lanes_low)
            out[i + distance] = shuffle(builder, a, b, lanes_high)
    return out


def _unpack(width):
    """Lanes of x86's "unpack low" and "unpack high" of two vectors, for elements of `width` words."""
    low, high = [], []
    for lane in range(0, LANES, 4):
        for half, out in ((0, low), (1, high)):
            for element in range(0, 2, width):
                for source in (0, LANES):
                    start = lane + 2 * half + element + source
                    out.extend(range(start, start + width))
    return low, high


def _quarters(first, second):
    """Lanes that take two quarters (of 4 words) of each vector."""
    return [
        source + 4 * quarter + k for source in (0, LANES) for quarter in (first, second) for k in range(4)
    ]


def _transposed(builder, vectors):
    """16 vectors of 16 words, as columns."""
    step1 = _pairs(builder, vectors, 1, *_unpack(1))
    step2 = _pairs(builder, step1, 2, *_unpack(2))
    # Vector 4 g + c now holds, in quarter l, column 4 l + (0, 2, 1, 3)[c] of rows 4 g to 4 g + 3.
    step3 = _pairs(builder, step2, 4, _quarters(0, 1), _quarters(2, 3))
    step4 = _pairs(builder, step3, 8, _quarters(0, 2), _quarters(1, 3))
    column = {}
    for c in range(4):
        inner = (0, 2, 1, 3)[c]
        for quarter, index in enumerate((c, c + 8, c + 4, c + 12)):
            column[4 * quarter + inner] = step4[index]
    return [column[k] for k in range(LANES)]


def _load_transposed(builder, table, offset):
    rows = [builder.add(load(builder, table, I64, 8 * r), offset) for r in range(LANES)]
    return _transposed(builder, [load(builder, row, i32x16.llvm) for row in rows])


@intrinsic
def transpose_words(typingctx, table, offset, target, together, step):
    """Words w = 0..15 at `offset` of 16 rows -> 64 bytes each, row by row, at target + w // together * step
    + w % together * 64.
    """

    def generate(builder, table_, offset_, target_, together_, step_):
        for w, vector in enumerate(_load_transposed(builder, table_, offset_)):
            chunk, rest = builder.udiv(I64(w), together_), builder.urem(I64(w), together_)
            where = builder.add(builder.mul(chunk, step_), builder.mul(rest, I64(64)))
            store(builder, vector, builder.add(target_, where))

    return word(types.void, generate, *[types.int64] * 5)


@intrinsic
def transpose_pairs(typingctx, table, offset, target, step):
    """As `transpose_words` for words of two 16-bit parts: at target + w * step the 16 low ones, then the 16
    high ones.
    """

    def generate(builder, table_, offset_, target_, step_):
        halves = ir.VectorType(I16, LANES)
        for w, vector in enumerate(_load_transposed(builder, table_, offset_)):
            where = builder.add(target_, builder.mul(I64(w), step_))
            store(builder, builder.trunc(vector, halves), where)
            store(builder, builder.trunc(builder.lshr(vector, constant(vector.type, 16)), halves), where, 32)

    return word(types.void, generate, *[types.int64] * 4)
