"""Memory for weights: zeroed, aligned, writable to the last byte, refused with a sentence."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from pyinfer.errors import CapacityError
from pyinfer.jit.buffers import HUGE_PAGE_BYTES, allocate


@pytest.mark.parametrize(
    "n_bytes", [1, 63, 64, 4097, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + 5]
)
def test_buffers_are_zeroed_aligned_and_writable(n_bytes):
    made = allocate(n_bytes)
    assert made.dtype == np.uint8 and made.shape == (n_bytes,)
    assert made.ctypes.data % (HUGE_PAGE_BYTES if n_bytes >= HUGE_PAGE_BYTES else 64) == 0
    assert not made.any()
    made[:] = 255
    assert made.all()


def test_buffers_do_not_overlap():
    made = [allocate(n_bytes) for n_bytes in (100, HUGE_PAGE_BYTES, 100, HUGE_PAGE_BYTES + 1)]
    for number, buffer in enumerate(made):
        buffer[:] = number
    for number, buffer in enumerate(made):
        assert (buffer == number).all()


def test_a_view_keeps_the_memory():
    view = allocate(2 * HUGE_PAGE_BYTES)[-8:].view(np.int64)
    view[0] = 42
    gc.collect()
    assert [int(allocate(2 * HUGE_PAGE_BYTES)[0]) for _ in range(4)] == [0] * 4
    assert view[0] == 42


@pytest.mark.parametrize("n_bytes", [1 << 60, 1 << 63, 1 << 70])
def test_too_much_is_refused_with_the_size(n_bytes):
    with pytest.raises(CapacityError, match=f"{n_bytes:,} bytes"):
        allocate(n_bytes)
