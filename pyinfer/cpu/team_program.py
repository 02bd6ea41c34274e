"""Instructions as the team runs them: int64 rows of (kernel, operands, items, mode, barrier)."""

from __future__ import annotations

import numpy as np

from pyinfer.jit.kernel import Kernel
from pyinfer.jit.team import BARRIER, DYNAMIC, FIELDS, ITEMS, KERNEL, MODE, OPERANDS


def instruction(kernel: Kernel, operands: np.ndarray, items: int, mode: int, barrier: bool) -> np.ndarray:
    """One instruction; the caller keeps `operands` alive."""
    row = np.zeros(FIELDS, np.int64)
    row[KERNEL], row[OPERANDS], row[ITEMS], row[MODE], row[BARRIER] = (
        kernel.address,
        operands.ctypes.data,
        items,
        mode,
        barrier,
    )
    return row


def single_instruction(kernel: Kernel, operands: np.ndarray, items: int) -> np.ndarray:
    """A program of one dynamic instruction."""
    return instruction(kernel, operands, items, DYNAMIC, True)[None]
