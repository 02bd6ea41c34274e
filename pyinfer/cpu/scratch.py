"""Buffers of a lowered program: who wrote them since the last barrier, and which memory is free again."""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer.cpu.step import ROWS
from pyinfer.jit.buffers import allocate

PRIVATE, BY_ROWS, SHARED = range(3)  # who wrote a buffer since the last barrier


@dataclass(eq=False)
class Buffer:
    """float32 rows (or prepared activations) in memory; a view shares its parent's memory.

    private : bytes from one thread's copy to the next, 0 when shared;  count : the row count it is laid out
    for
    """

    address: int
    stride: int
    private: int
    n_bytes: int
    copies: int = 1
    written: int = PRIVATE
    count: int = ROWS
    parent: Buffer | None = None

    @property
    def whole(self) -> Buffer:
        return self.parent.whole if self.parent else self

    def view(self, byte_offset: int) -> Buffer:
        """The part of every row that begins `byte_offset` bytes behind this one's."""
        return Buffer(self.address + byte_offset, self.stride, self.private, 0, count=self.count, parent=self)


class Scratch:
    """Hands out buffers; what is given back is reused only behind a barrier, when no thread can still read
    it.
    """

    def __init__(self) -> None:
        self.memory: list = []  # everything allocated: the plan keeps it alive
        self._free: dict[tuple[int, int], list[Buffer]] = {}
        self._given_back: list[Buffer] = []

    def new(self, n_bytes: int, stride: int, copies: int, count: int) -> Buffer:
        n_bytes = (n_bytes + 63) // 64 * 64
        free = self._free.get((n_bytes, copies))
        if free:
            address = free.pop().address
        else:
            self.memory.append(allocate(n_bytes * copies + 64))
            address = self.memory[-1].ctypes.data
        return Buffer(address, stride, n_bytes if copies > 1 else 0, n_bytes, copies, count=count)

    def give_back(self, buffer: Buffer) -> None:
        self._given_back.append(buffer)

    def barrier(self) -> None:
        for buffer in self._given_back:
            self._free.setdefault((buffer.n_bytes, buffer.copies), []).append(buffer)
        self._given_back.clear()
