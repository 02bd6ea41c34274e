"""Searching for scales, 16 groups side by side: lane g of every vector belongs to group g.

The groups of one or more K-quant blocks are transposed into a scratch area: the numbers at 64 i are number i
of each group. A search step then costs a few vector operations per number and no sums across lanes.
"""

from __future__ import annotations

import numpy as np

from pyinfer.jit.exact import magnitude_bits, max_f32x16, min_f32x16, nearest_f32x16, sqrt_f32x16
from pyinfer.jit.kernel import inline
from pyinfer.jit.memory import f32_at, i64_at
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    mul_f32x16,
    splat_f32x16,
    store_f32x16,
)
from pyinfer.quants.blocks import COLUMNS, F16, F32, KIND, SCRATCH, SCRATCH_BYTES, SOURCE, TARGET

# Places in a thread's scratch, in bytes.
NUMBERS, WEIGHTS, CODES, ROW, LANES = 0, 2048, 4096, 4608, 4672


@inline
def scratch_of(operands, thread):
    return i64_at(operands)[SCRATCH] + SCRATCH_BYTES * thread


@inline
def lane_floats(scratch, k):
    """Vector k of those that scalar code and lanes exchange."""
    return scratch + LANES + 64 * k


@inline
def transpose(operands, start, group, lane, scratch):
    """Numbers start .. start + group - 1 of the source become lane `lane`; returns the bits of the largest
    magnitude.
    """
    given = i64_at(operands)
    kind, source = given[KIND], given[SOURCE]
    numbers, row = f32_at(scratch + NUMBERS), f32_at(scratch + ROW)
    most = np.uint32(0)
    for part in range(group // 16):
        at = start + 16 * part
        if kind == F32:
            vector = load_f32x16(source + 4 * at)
        elif kind == F16:
            vector = load_f16x16(source + 2 * at)
        else:
            vector = load_bf16x16(source + 2 * at)
        bits = magnitude_bits(vector, vector)
        if bits > most:
            most = bits
        store_f32x16(scratch + ROW, vector)
        for i in range(16):
            numbers[16 * (16 * part + i) + lane] = row[i]
    return most


@inline
def clamped(value, least, most):
    """The nearest whole numbers within [least, most]."""
    return min_f32x16(max_f32x16(nearest_f32x16(value), least), most)


@inline
def number(scratch, i):
    return load_f32x16(scratch + NUMBERS + 64 * i)


@inline
def weight(scratch, i):
    return load_f32x16(scratch + WEIGHTS + 64 * i)


@inline
def magnitude(value):
    return max_f32x16(value, mul_f32x16(value, splat_f32x16(np.float32(-1))))


@inline
def blocks_of(operands, first, last):
    """(blocks of 256 before row `first`, blocks of rows [first, last), address of the blocks)."""
    given = i64_at(operands)
    columns = given[COLUMNS]
    return first * columns // 256, (last - first) * columns // 256, given[TARGET]


@inline
def weigh(scratch, group):
    """How much each number's error counts: its magnitude and 4 times the group's root mean square.

    Large weights matter more than others, but weighed with one root mean square, as llama.cpp does, the plain
    error grows; with 4 the plain error and llama.cpp's are both below what llama.cpp leaves.
    """
    total = splat_f32x16(np.float32(0))
    for i in range(group):
        x = number(scratch, i)
        total = fma_f32x16(x, x, total)
    usual = sqrt_f32x16(mul_f32x16(total, splat_f32x16(np.float32(16 / group))))
    for i in range(group):
        store_f32x16(scratch + WEIGHTS + 64 * i, add_f32x16(magnitude(number(scratch, i)), usual))
