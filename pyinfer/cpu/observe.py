"""Kernels that look at rows while a model runs: how often neurons fired, how large activations are, or the
rows themselves.

Items are rows. Counts are integers in one copy per thread, so their sum does not depend on how rows were
divided.
"""

from __future__ import annotations

import numpy as np
from numpy import float32

from pyinfer.cpu.rows import IN, WIDTH, row_at
from pyinfer.jit.kernel import Kernel, kernel
from pyinfer.jit.memory import f32_at, float_to_bits, i64_at
from pyinfer.program.program import Program
from pyinfer.program.sparsity import HISTOGRAM_BINS, HISTOGRAM_SHIFT, STATS

# Operands behind those of row kernels: int64 counters and their bytes per thread, or rows and bytes per row.
COUNTERS, COUNTER_BYTES = 11, 12
LAST_BIN = HISTOGRAM_BINS - 1


@kernel
def fired(operands, step, first, last, thread):
    """counters[f] += x[f] != 0"""
    given = i64_at(operands)
    counters = i64_at(given[COUNTERS] + thread * given[COUNTER_BYTES])
    for row in range(first, last):
        x = f32_at(row_at(given, IN, row, thread))
        for f in range(given[WIDTH]):
            counters[f] += x[f] != float32(0)


@kernel
def histogram(operands, step, first, last, thread):
    """counters[bin of |x[f]|] += 1, for all f together"""
    given = i64_at(operands)
    counters = i64_at(given[COUNTERS] + thread * given[COUNTER_BYTES])
    for row in range(first, last):
        x = f32_at(row_at(given, IN, row, thread))
        for f in range(given[WIDTH]):
            counters[(float_to_bits(x[f]) >> HISTOGRAM_SHIFT) & LAST_BIN] += 1


@kernel
def keep_rows(operands, step, first, last, thread):
    """Copy rows to where they can be read after the step."""
    given = i64_at(operands)
    for row in range(first, last):
        x = f32_at(row_at(given, IN, row, thread))
        out = f32_at(given[COUNTERS] + row * given[COUNTER_BYTES])
        for f in range(given[WIDTH]):
            out[f] = x[f]


KERNELS = {"fired": fired, "histogram": histogram, **dict.fromkeys(STATS, fired)}


def kernel_for(what: str) -> Kernel:
    return KERNELS.get(what, keep_rows)


class Observed:
    """Where the `observe` ops of a program write, by (what, layer)."""

    def __init__(self, program: Program, n_threads: int, capacity: int) -> None:
        self.n_rows = 0  # of the last step
        self.few_rows = 0  # of all steps that skip neurons
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        for op in program.ops:
            if op.name == "observe":
                what, width = op.params["what"], op.inputs[0].width
                if what in KERNELS:
                    shape = n_threads, HISTOGRAM_BINS if what == "histogram" else width
                    array = np.zeros(shape, np.int64)
                else:
                    array = np.zeros((capacity, width), np.float32)
                self._arrays[what, op.params["layer"]] = array

    def array(self, what: str, layer: int) -> np.ndarray:
        """The array that the kernels write: [threads, counters] or [capacity, width]."""
        return self._arrays[what, layer]

    def get(self, what: str, layer: int) -> np.ndarray | None:
        """A copy: int64 counts of all threads, or float32 rows of the last step; None if not observed."""
        array = self._arrays.get((what, layer))
        if array is None:
            return None
        return array.sum(0) if what in KERNELS else array[: self.n_rows].copy()

    def reset(self) -> None:
        self.few_rows = 0
        for array in self._arrays.values():
            array.fill(0)
