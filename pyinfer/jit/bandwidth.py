"""The memory's read limit, measured with the words that the kernels use: the bound of every one-token
step.
"""

from __future__ import annotations

import time

import numpy as np

from pyinfer.jit.buffers import allocate
from pyinfer.jit.kernel import kernel
from pyinfer.jit.memory import f32_at, i64_at, prefetch
from pyinfer.jit.simd import add_f32x16, load_f32x16, splat_f32x16, sum_f32x16
from pyinfer.jit.team import FIELDS, STATIC, Team

TOTAL_BYTES, ITEM_BYTES, PASSES = 1 << 29, 1 << 16, 7


@kernel
def _read(operands, step, first, last, thread):
    given = i64_at(operands)
    total = splat_f32x16(np.float32(0))
    for at in range(given[0] + first * ITEM_BYTES, given[0] + last * ITEM_BYTES, 64):
        prefetch(at + 1024)
        total = add_f32x16(total, load_f32x16(at))
    f32_at(given[1])[16 * thread] = sum_f32x16(total)


def read_bandwidth(threads: int) -> float:
    """Bytes per second; the best of several passes, since other programs can only slow one down."""
    memory, sums = allocate(TOTAL_BYTES), np.zeros(16 * threads, np.float32)
    memory[:: 1 << 12] = 1  # every page its own
    operands = np.array([memory.ctypes.data, sums.ctypes.data], np.int64)
    program = np.zeros((1, FIELDS), np.int64)
    program[0] = _read.address, operands.ctypes.data, TOTAL_BYTES // ITEM_BYTES, STATIC, 1
    team = Team(threads)
    best = float("inf")
    for _ in range(PASSES):
        start = time.perf_counter()
        team.run(program, operands)
        best = min(best, time.perf_counter() - start)
    team.close()
    return TOTAL_BYTES / best
