"""Memory for weights and scratch: zeroed, aligned to 2 MiB, with huge pages where the system gives them.

4 KiB pages cost a decode step that reads gigabytes up to a quarter of its bandwidth (page walks).
"""

from __future__ import annotations

import mmap

import numpy as np

from pyinfer.errors import CapacityError

HUGE_PAGE_BYTES = 1 << 21


def allocate(n_bytes: int, huge: bool = True) -> np.ndarray:
    """uint8 [n_bytes] of zeros at an address that is a multiple of 2 MiB (64 for small ones). Raises
    CapacityError.

    huge=False for memory of which little may be used: a huge page is there as a whole once a byte of it is
    touched.
    """
    small = n_bytes < HUGE_PAGE_BYTES
    alignment = 64 if small else HUGE_PAGE_BYTES
    try:
        if small:
            raw = np.zeros(n_bytes + alignment, np.uint8)
        else:
            # private: a shared mapping, Python's default, gets no huge pages
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            pages = mmap.mmap(-1, n_bytes + alignment, **private)
            if huge and hasattr(pages, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
                pages.madvise(mmap.MADV_HUGEPAGE)
            raw = np.frombuffer(pages, np.uint8)
    except (MemoryError, OSError, OverflowError, ValueError) as error:
        raise CapacityError(f"cannot allocate {n_bytes:,} bytes of memory: {error}") from error
    start = -raw.ctypes.data % alignment
    return raw[start : start + n_bytes]
