"""From a program to instructions for the team, for one class of steps: one row, up to four, or many; none,
one, few or many wanted.

A step of one row runs everything but linears and attention in every thread, into private copies: no barriers.
With more rows, row operations are split by rows, and a barrier stands only where a thread reads what others
wrote. Linears of the same input whose weights lie back to back become one; the addition of a linear to the
residual becomes part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pyinfer.cpu import attention, linear, rows
from pyinfer.cpu.step import ROWS, WANTED
from pyinfer.cpu.team_program import instruction
from pyinfer.cpu.weights import Weights
from pyinfer.jit.buffers import allocate
from pyinfer.jit.kernel import Kernel
from pyinfer.jit.levels import TILES, level
from pyinfer.jit.team import BARRIER, DYNAMIC, EVERY_THREAD, FIELDS, STATIC
from pyinfer.program.program import Op, Program, Value
from pyinfer.quants import quant
from pyinfer.quants.panels import PANEL_ROWS, panels_of

PRIVATE, BY_ROWS, SHARED = range(3)  # who wrote a buffer since the last barrier


@dataclass
class Buffer:
    """float32 rows (or prepared activations) in memory; a view shares its parent's memory."""

    address: int
    stride: int
    private: int  # bytes from one thread's copy to the next, 0 when shared
    n_bytes: int
    written: int = PRIVATE
    count: int = ROWS
    parent: Buffer | None = None

    @property
    def whole(self) -> Buffer:
        return self.parent or self


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
    tables: dict
    constants: dict[float, int]


class Lowering:
    """One pass over the ops; emits instructions and hands out buffers."""

    def __init__(
        self, program: Program, machine: Machine, n_rows: int, n_wanted: int, tile: int, wanted_tile: int
    ) -> None:
        self._program, self._machine = program, machine
        self._capacity = {ROWS: n_rows, WANTED: n_wanted}
        self._tile = {ROWS: tile, WANTED: wanted_tile}
        self._count = ROWS
        self._rows: list[np.ndarray] = []
        self._count_of: list[tuple[str, int]] = []
        self._keep: list = []
        self._buffers: dict[int, Buffer] = {}
        self._prepared: dict[int, Buffer] = {}
        self._free: dict[tuple[int, int], list[Buffer]] = {}
        self._freed_since_barrier: list[Buffer] = []
        self._last_use = {
            value.index: position for position, op in enumerate(program.ops) for value in op.inputs
        }
        self._dirty: list[Buffer] = []
        self._stored = Buffer(0, 0, 0, 0)

    # ---- buffers ----

    @property
    def _single(self) -> bool:
        return self._tile[self._count] == 1

    def _new(self, n_bytes: int, stride: int, shared: bool) -> Buffer:
        copies = 1 if shared or not self._single else self._machine.n_threads
        n_bytes = (n_bytes + 63) // 64 * 64
        free = self._free.get((n_bytes, copies))
        if free:
            old = free.pop()
            return Buffer(old.address, stride, old.private, n_bytes, count=self._count)
        memory = allocate(n_bytes * copies + 64)
        self._keep.append(memory)
        return Buffer(memory.ctypes.data, stride, n_bytes if copies > 1 else 0, n_bytes, count=self._count)

    def _new_rows(self, width: int, shared: bool) -> Buffer:
        stride = panels_of(width) * PANEL_ROWS * 4
        rows_padded = -(-self._capacity[self._count] // 8) * 8 if not self._single else 1
        return self._new(stride * rows_padded, stride, shared)

    def _release(self, position: int) -> None:
        """Buffers whose values nobody reads any more are free after the next barrier."""
        for index in [i for i in self._buffers if self._last_use.get(i, len(self._program.ops)) <= position]:
            buffer = self._buffers.pop(index).whole
            if not any(other.whole is buffer for other in self._buffers.values()):
                self._freed_since_barrier.append(buffer)
            prepared = self._prepared.pop(index, None)
            if prepared is not None:
                self._freed_since_barrier.append(prepared)

    # ---- instructions ----

    def _barrier(self) -> None:
        if self._rows:
            self._rows[-1][BARRIER] = 1
        for buffer in self._dirty:
            buffer.written = PRIVATE
        self._dirty.clear()
        for buffer in self._freed_since_barrier:
            copies = self._machine.n_threads if buffer.private else 1
            self._free.setdefault((buffer.n_bytes, copies), []).append(buffer)
        self._freed_since_barrier.clear()

    def _emit(
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
                whole.written == BY_ROWS and not (by_rows and whole.count == self._count)
            ):
                self._barrier()
        self._keep.append(operands)
        self._rows.append(instruction(kernel, operands, 0, mode, mode == DYNAMIC))
        self._count_of.append(items)
        if writes is not None:
            writes.written = PRIVATE if mode == EVERY_THREAD else BY_ROWS if by_rows else SHARED
            if writes.written != PRIVATE:
                self._dirty.append(writes)
        if mode == DYNAMIC:
            self._barrier()

    def _row_operands(self, count: int, width: int, inputs: list[Buffer], out: Buffer) -> np.ndarray:
        operands = np.zeros(rows.OPERANDS, np.int64)
        for base, buffer in zip((rows.IN, rows.IN2), inputs):
            operands[base : base + 3] = buffer.address, buffer.stride, buffer.private
        operands[rows.OUT : rows.OUT + 3] = out.address, out.stride, out.private
        operands[rows.WIDTH], operands[rows.COUNT] = width, count
        return operands

    def _row_op(self, kernel: Kernel, width: int, inputs: list[Buffer], out: Buffer, **extra: int) -> None:
        operands = self._row_operands(self._count, width, inputs, out)
        for name, value in extra.items():
            operands[getattr(rows, name)] = value
        items = ("rows" if self._count == ROWS else "wanted", 1)
        self._emit(kernel, operands, items, EVERY_THREAD if self._single else STATIC, inputs, out)

    # ---- ops ----

    def lower(self) -> Plan:
        ops = self._program.ops
        position, logits = 0, None
        while position < len(ops):
            op = ops[position]
            if op.name == "select" and not self._capacity[WANTED]:
                break
            taken = getattr(self, f"_{op.name}")(op, position)
            position += taken or 1
            self._release(position - 1)
            if op.name == "linear":
                logits = self._buffers.get(op.output.index) if op.output else None
        self._barrier()
        return Plan(
            np.concatenate([row[None] for row in self._rows]).reshape(-1, FIELDS),
            self._count_of,
            logits,
            self._keep,
        )

    def _input(self, op: Op, n: int = 0) -> Buffer:
        return self._buffers[op.inputs[n].index]

    def _output(self, op: Op, shared: bool = False) -> Buffer:
        buffer = self._new_rows(op.output.width, shared)
        self._buffers[op.output.index] = buffer
        return buffer

    def _embed(self, op: Op, position: int) -> None:
        tensor, file = op.weight, quant(op.weight.type)
        panel_bytes = file.LAYOUT.panel_bytes(tensor.columns)
        panel = allocate((panel_bytes + 64) * self._machine.n_threads)
        self._keep.append(panel)
        out = self._output(op)
        extra = {
            "PACK": file.pack.address,
            "DATA": tensor.data.ctypes.data,
            "ROW_BYTES": tensor.columns // file.BLOCK * file.BLOCK_BYTES,
            "PANEL": panel.ctypes.data,
            "PANEL_BYTES": panel_bytes,
            "SCALE": self._machine.constants[op.params["scale"]],
        }
        self._row_op(rows.embed(file.LAYOUT), op.output.width, [], out, **extra)

    def _rms_norm(self, op: Op, position: int) -> None:
        weight = self._machine.weights.vectors[op.weight.name]
        extra = {
            "WEIGHT": weight.ctypes.data,
            "EPSILON": self._machine.constants[op.params["epsilon"]],
            "HEADS": op.params["heads"],
        }
        self._row_op(rows.rms_norm, op.output.width, [self._input(op)], self._output(op), **extra)

    def _rope(self, op: Op, position: int) -> None:
        rope, heads = op.params["rope"], op.params["heads"]
        extra = {
            "TABLE": self._machine.tables[rope].ctypes.data,
            "HEAD_SIZE": op.output.width // heads,
            "ROTATED": rope.dimension_count,
            "NEOX": rope.neox,
            "ROPE_HEADS": heads,
        }
        self._row_op(rows.rope, op.output.width, [self._input(op)], self._output(op), **extra)

    def _gate(self, op: Op, position: int) -> None:
        kernel = getattr(rows, f"gate_{op.params['activation']}")
        self._row_op(kernel, op.output.width, [self._input(op), self._input(op, 1)], self._output(op))

    def _add(self, op: Op, position: int) -> None:
        self._row_op(rows.add, op.output.width, [self._input(op), self._input(op, 1)], self._output(op))

    def _select(self, op: Op, position: int) -> None:
        source = self._input(op)
        if source.whole.written != PRIVATE:
            self._barrier()
        self._count = WANTED
        self._row_op(rows.select, op.output.width, [source], self._output(op))

    def _store(self, op: Op, position: int) -> None:
        k, v = self._input(op), self._input(op, 1)
        operands = self._attention_operands(op)
        operands[attention.K : attention.K + 3] = k.address, k.stride, k.private
        operands[attention.V : attention.V + 3] = v.address, v.stride, v.private
        operands[attention.HEAD_SIZE] = op.inputs[0].width // op.params["kv_heads"]
        cache = Buffer(0, 0, 0, 0)  # stands for the cache of the layer: attention must wait for it
        self._emit(attention.store, operands, ("store", op.params["kv_heads"]), STATIC, [k, v], cache)
        self._stored = cache

    def _attention_operands(self, op: Op) -> np.ndarray:
        operands = np.zeros(attention.OPERANDS, np.int64)
        layer, machine = op.params["layer"], self._machine
        operands[attention.KEYS], operands[attention.VALUES] = machine.keys[layer], machine.values[layer]
        operands[attention.HEAD_BYTES], operands[attention.KV_HEADS] = (
            machine.head_bytes,
            op.params["kv_heads"],
        )
        return operands

    def _attend(self, op: Op, position: int) -> None:
        q, out, params = self._input(op), self._output(op, shared=True), op.params
        operands = self._attention_operands(op)
        operands[attention.Q : attention.Q + 3] = q.address, q.stride, q.private
        operands[attention.OUT], operands[attention.OUT_STRIDE] = out.address, out.stride
        operands[attention.HEADS], operands[attention.HEAD_SIZE] = params["heads"], params["head_size"]
        operands[attention.WINDOW], operands[attention.SCALE] = (
            params["window"],
            self._machine.constants[params["scale"]],
        )
        each = attention.scratch_bytes(params["head_size"])
        scratch = allocate(each * self._machine.n_threads)
        self._keep.append(scratch)
        operands[attention.SCRATCH], operands[attention.SCRATCH_BYTES] = scratch.ctypes.data, each
        group = params["heads"] // params["kv_heads"]
        few, many = TILES[level.get()]
        tile = many if self._tile[ROWS] == many or group > few else few if group > 1 else 1
        mode = STATIC if self._single else DYNAMIC
        self._emit(
            attention.attend(tile), operands, ("attend", params["kv_heads"]), mode, [q, self._stored], out
        )

    def _linear(self, op: Op, position: int) -> int:
        """One instruction for this linear and those behind it that can join; returns how many ops it took."""
        group = self._joined(position)
        residual, taken = self._residual(group, position)
        matrices = [self._machine.weights.matrices[each.weight.name] for each in group]
        first = matrices[0]
        x = self._input(op)
        source = x if first.layout.is_float else self._prepare(op.inputs[0], x)
        width = sum(panels_of(matrix.rows) * PANEL_ROWS for matrix in matrices)
        out = self._new_rows(width, shared=True)
        start = 0
        for each, matrix in zip(group, matrices):
            whole = (
                out
                if len(group) == 1
                else Buffer(out.address + 4 * start, out.stride, 0, 0, count=self._count, parent=out)
            )
            self._buffers[each.output.index] = whole
            start += panels_of(matrix.rows) * PANEL_ROWS
        operands = np.zeros(linear.OPERANDS, np.int64)
        operands[linear.WEIGHT], operands[linear.PANEL_STRIDE], operands[linear.COLUMNS] = (
            first.address,
            first.panel_stride,
            first.columns,
        )
        operands[linear.COUNT] = self._count
        operands[linear.X : linear.X + 3] = source.address, source.stride, source.private
        operands[linear.OUT], operands[linear.OUT_STRIDE] = out.address, out.stride
        reads = [source]
        if residual is not None:
            buffer = self._buffers[residual.index]
            operands[linear.RESIDUAL : linear.RESIDUAL + 3] = buffer.address, buffer.stride, buffer.private
            reads.append(buffer)
            self._buffers[self._program.ops[position + taken - 1].output.index] = out
        bias = self._bias_of(group, matrices)
        if bias is not None:
            self._keep.append(bias)
            operands[linear.BIAS] = bias.ctypes.data
        kernel = linear.linear(first.layout, self._tile[self._count])
        mode = STATIC if self._single else DYNAMIC
        self._emit(kernel, operands, ("panels", width // PANEL_ROWS), mode, reads, out)
        return taken

    def _joined(self, position: int) -> list[Op]:
        """This linear and the following ones of the same input whose panels continue its own."""
        ops, matrices = self._program.ops, self._machine.weights.matrices
        group = [ops[position]]
        for op in ops[position + 1 :]:
            if op.name != "linear" or op.inputs != group[0].inputs:
                break
            before, this = matrices[group[-1].weight.name], matrices[op.weight.name]
            if this.address != before.end or this.layout != before.layout or this.columns != before.columns:
                break
            group.append(op)
        return group

    def _residual(self, group: list[Op], position: int) -> tuple[Value | None, int]:
        """The other addend when the next op only adds this linear to something, and how many ops are
        taken.
        """
        taken = len(group)
        after = self._program.ops[position + taken] if position + taken < len(self._program.ops) else None
        output = group[0].output
        if taken > 1 or after is None or after.name != "add" or output not in after.inputs:
            return None, taken
        others = [value for value in after.inputs if value != output]
        if self._last_use[output.index] == position + 1 and len(others) == 1:
            return others[0], taken + 1
        return None, taken

    def _bias_of(self, group: list[Op], matrices) -> np.ndarray | None:
        if not any(op.bias for op in group):
            return None
        parts = []
        for op, matrix in zip(group, matrices):
            length = panels_of(matrix.rows) * PANEL_ROWS
            parts.append(
                self._machine.weights.vectors[op.bias.name] if op.bias else np.zeros(length, np.float32)
            )
        return np.concatenate(parts)

    def _prepare(self, value: Value, x: Buffer) -> Buffer:
        """The quantized form of a value, made once for all linears that read it."""
        if value.index not in self._prepared:
            capacity = 1 if self._single else -(-self._capacity[self._count] // 8) * 8
            out = self._new(linear.prepared_bytes(value.width, capacity), 0, shared=False)
            self._row_op(rows.quantize, value.width, [x], out, TILE=self._tile[self._count])
            self._prepared[value.index] = out
        return self._prepared[value.index]
