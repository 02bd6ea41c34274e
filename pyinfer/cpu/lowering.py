"""From a program to instructions for the team, for one class of steps: one row, few, or many; none,
one, few or many wanted.

A step of one row runs everything but linears and attention in every thread, into private copies: no barriers.
With more rows, row operations are split by rows, and a barrier stands only where a thread reads what others
wrote. Linears of the same input whose weights lie back to back become one; the addition of a linear to the
residual becomes part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.cpu import lower_attention, lower_linear, lower_neurons, lower_rows, rows
from pyinfer.cpu.observe import Observed
from pyinfer.cpu.scratch import BY_ROWS, PRIVATE, SHARED, Buffer, Scratch
from pyinfer.cpu.step import ROWS, WANTED
from pyinfer.cpu.team_program import instruction
from pyinfer.cpu.weights import Weights
from pyinfer.jit.buffers import allocate
from pyinfer.jit.kernel import Kernel
from pyinfer.jit.team import BARRIER, DYNAMIC, EVERY_THREAD, FIELDS, STATIC
from pyinfer.program.program import Op, Program
from pyinfer.quants.panels import PANEL_ROWS, panels_of

# Up to so many rows of a step skip neurons.
MOST_BY_ROWS = 16
OP_FAMILIES = (
    lower_rows,
    lower_linear,
    lower_neurons,
    lower_attention,
)  # each lowers the ops that it has functions for


@dataclass
class Plan:
    """Instructions for one class of steps; `count_of[i]` says how the number of items of instruction i
    follows from the step.
    """

    instructions: np.ndarray
    count_of: list[tuple[str, int]]
    logits: Buffer | None
    keep: list = field(default_factory=list)  # operands and buffers that the instructions point to


@dataclass(frozen=True)
class Machine:
    """What a lowering is for: threads, weights, the KV cache and rope tables of a session, in bytes and
    addresses.
    """

    n_threads: int
    weights: Weights
    keys: list[int]
    values: list[int]
    head_bytes: int
    element_bytes: int
    tables: dict
    observed: Observed


class Lowering:
    """One pass over the ops; emits instructions and hands out buffers."""

    def __init__(
        self, program: Program, machine: Machine, n_rows: int, n_wanted: int, tile: int, wanted_tile: int
    ) -> None:
        self.machine = machine
        self.capacity = {ROWS: n_rows, WANTED: n_wanted}
        self.program = program if self.by_rows else program.without_guesses()
        self.tile = {ROWS: tile, WANTED: wanted_tile}
        self.count = ROWS
        self._rows: list[np.ndarray] = []
        self.count_of: list[tuple[str, int]] = []
        self._scratch = Scratch()
        self.keep = self._scratch.memory
        self.buffers: dict[int, Buffer] = {}
        self.prepared: dict[int, Buffer] = {}
        self.last_use = {
            value.index: position for position, op in enumerate(self.program.ops) for value in op.inputs
        }
        self._dirty: list[Buffer] = []
        self._thread_bytes = self._thread_address = 0
        self.stored = Buffer(0, 0, 0, 0)

    # ---- buffers ----

    @property
    def by_rows(self) -> bool:
        """Whether neuron-major weights are used row by row, skipping: for few rows; else as panels."""
        return self.capacity[ROWS] <= MOST_BY_ROWS

    @property
    def single(self) -> bool:
        return self.tile[self.count] == 1

    def new(self, n_bytes: int, stride: int, shared: bool) -> Buffer:
        copies = 1 if shared or not self.single else self.machine.n_threads
        return self._scratch.new(n_bytes, stride, copies, self.count)

    def new_rows(self, width: int, shared: bool) -> Buffer:
        stride = panels_of(width) * PANEL_ROWS * 4
        rows_padded = -(-self.capacity[self.count] // 8) * 8 if not self.single else 1
        return self.new(stride * rows_padded, stride, shared)

    def free(self, buffer: Buffer) -> None:
        """Its memory may be another's after the next barrier."""
        self._scratch.give_back(buffer)

    def thread_scratch(self, n_bytes: int) -> tuple[int, int]:
        """Address and bytes per thread of memory that a kernel uses only while it runs; all share it."""
        if n_bytes > self._thread_bytes:
            self._thread_bytes = n_bytes
            self.keep.append(allocate(n_bytes * self.machine.n_threads))
            self._thread_address = self.keep[-1].ctypes.data
        return self._thread_address, self._thread_bytes

    def _release(self, position: int) -> None:
        """Buffers whose values nobody reads any more are free after the next barrier."""
        for index in [i for i in self.buffers if self.last_use.get(i, len(self.program.ops)) <= position]:
            buffer = self.buffers.pop(index).whole
            if not any(other.whole is buffer for other in self.buffers.values()):
                self._scratch.give_back(buffer)
            prepared = self.prepared.pop(index, None)
            if prepared is not None:
                self._scratch.give_back(prepared)

    # ---- instructions ----

    def barrier(self) -> None:
        if self._rows:
            self._rows[-1][BARRIER] = 1
        for buffer in self._dirty:
            buffer.written = PRIVATE
        self._dirty.clear()
        self._scratch.barrier()

    def emit(
        self,
        kernel: Kernel,
        operands: np.ndarray,
        items: tuple[str, int],
        mode: int,
        reads: list[Buffer],
        writes: Buffer | None,
    ) -> None:
        by_rows = mode == STATIC and items[0] in ("rows", "wanted")
        for buffer in reads:
            whole = buffer.whole
            if whole.written == SHARED or (
                whole.written == BY_ROWS and not (by_rows and whole.count == self.count)
            ):
                self.barrier()
        self.keep.append(operands)
        self._rows.append(instruction(kernel, operands, 0, mode, mode == DYNAMIC))
        self.count_of.append(items)
        if writes is not None:
            whole = writes.whole
            whole.written = PRIVATE if mode == EVERY_THREAD else BY_ROWS if by_rows else SHARED
            if whole.written != PRIVATE:
                self._dirty.append(whole)
        if mode == DYNAMIC:
            self.barrier()

    def row_kernel(
        self, kernel: Kernel, operands: np.ndarray, inputs: list[Buffer], out: Buffer | None
    ) -> None:
        items = ("rows" if self.count == ROWS else "wanted", 1)
        self.emit(kernel, operands, items, EVERY_THREAD if self.single else STATIC, inputs, out)

    def row_operands(self, width: int, inputs: list[Buffer], out: Buffer | None) -> np.ndarray:
        operands = np.zeros(rows.OPERANDS, np.int64)
        for base, buffer in zip((rows.IN, rows.IN2), inputs):
            operands[base : base + 3] = buffer.address, buffer.stride, buffer.private
        if out is not None:
            operands[rows.OUT : rows.OUT + 3] = out.address, out.stride, out.private
        operands[rows.WIDTH], operands[rows.COUNT] = width, self.count
        return operands

    def row_op(self, kernel: Kernel, width: int, inputs: list[Buffer], out: Buffer, **extra: int) -> None:
        operands = self.row_operands(width, inputs, out)
        for name, value in extra.items():
            operands[getattr(rows, name)] = value
        self.row_kernel(kernel, operands, inputs, out)

    # ---- ops ----

    def lower(self) -> Plan:
        ops = self.program.ops
        position, logits = 0, None
        while position < len(ops):
            op = ops[position]
            if op.name == "select" and not self.capacity[WANTED]:
                break
            family = next(module for module in OP_FAMILIES if hasattr(module, op.name))
            taken = getattr(family, op.name)(self, op, position)
            position += taken or 1
            self._release(position - 1)
            if op.name == "linear":
                logits = self.buffers.get(op.output.index) if op.output else None
        self.barrier()
        return Plan(
            np.concatenate([row[None] for row in self._rows]).reshape(-1, FIELDS),
            self.count_of,
            logits,
            self.keep,
        )

    def input(self, op: Op, n: int = 0) -> Buffer:
        return self.buffers[op.inputs[n].index]

    def output(self, op: Op, shared: bool = False) -> Buffer:
        buffer = self.new_rows(op.output.width, shared)
        self.buffers[op.output.index] = buffer
        return buffer

    def constant(self, number: float) -> int:
        """Address of a float32."""
        self.keep.append(np.array([number], np.float32))
        return self.keep[-1].ctypes.data
