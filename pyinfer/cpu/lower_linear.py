"""Lowering of linears: which of them join, what is added inside, and the quantized form of their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyinfer.cpu import linear as kernels
from pyinfer.cpu import rows
from pyinfer.cpu.scratch import Buffer
from pyinfer.jit.kernel import Kernel
from pyinfer.jit.team import DYNAMIC, STATIC
from pyinfer.program.program import Op, Value
from pyinfer.quants.panels import PANEL_ROWS, panels_of

if TYPE_CHECKING:
    from pyinfer.cpu.lowering import Lowering


def linear(lowering: Lowering, op: Op, position: int) -> int:
    """One instruction for this linear and those behind it that can join; returns how many ops it took."""
    group = _joined(lowering, position)
    residual, taken = residual_of(lowering, group, position)
    matrices = [lowering.machine.weights.matrices[each.weight.name] for each in group]
    layout, x = matrices[0].layout, lowering.input(op)
    source = x if layout.is_float else prepare(lowering, op.inputs[0], x)
    width = sum(panels_of(matrix.rows) * PANEL_ROWS for matrix in matrices)
    out = lowering.new_rows(width, shared=True)
    start = 0
    for each, matrix in zip(group, matrices):
        lowering.buffers[each.output.index] = out if len(group) == 1 else out.view(4 * start)
        start += panels_of(matrix.rows) * PANEL_ROWS
    operands = linear_operands(lowering, matrices[0], source, out)
    bias = _bias_of(lowering, group, matrices)
    kernel = kernels.linear(layout, lowering.tile[lowering.count])
    items = ("panels", width // PANEL_ROWS)
    _emit_linear(lowering, kernel, operands, items, [source], out, residual, bias)
    if residual is not None:
        lowering.buffers[lowering.program.ops[position + taken - 1].output.index] = out
    return taken


def linear_operands(lowering: Lowering, matrix, source: Buffer, out: Buffer) -> np.ndarray:
    operands = np.zeros(kernels.OPERANDS, np.int64)
    operands[kernels.WEIGHT], operands[kernels.PANEL_STRIDE] = matrix.address, matrix.stride
    operands[kernels.COLUMNS], operands[kernels.COUNT] = matrix.columns, lowering.count
    operands[kernels.X : kernels.X + 3] = source.address, source.stride, source.private
    operands[kernels.OUT], operands[kernels.OUT_STRIDE] = out.address, out.stride
    return operands


def _emit_linear(
    lowering: Lowering, kernel: Kernel, operands, items, reads, out, residual: Value | None, bias
) -> None:
    if residual is not None:
        buffer = lowering.buffers[residual.index]
        operands[kernels.RESIDUAL : kernels.RESIDUAL + 3] = buffer.address, buffer.stride, buffer.private
        reads = [*reads, buffer]
    if bias is not None:
        lowering.keep.append(bias)
        operands[kernels.BIAS] = bias.ctypes.data
    lowering.emit(kernel, operands, items, STATIC if lowering.single else DYNAMIC, reads, out)


def _joined(lowering: Lowering, position: int) -> list[Op]:
    """This linear and the following ones of the same input whose panels continue its own."""
    ops, matrices = lowering.program.ops, lowering.machine.weights.matrices
    group = [ops[position]]
    for op in ops[position + 1 :]:
        if op.name != "linear" or op.inputs != group[0].inputs:
            break
        before, this = matrices[group[-1].weight.name], matrices[op.weight.name]
        if this.address != before.end or this.layout != before.layout or this.columns != before.columns:
            break
        group.append(op)
    return group


def residual_of(lowering: Lowering, group: list[Op], position: int) -> tuple[Value | None, int]:
    """The other addend when the next op only adds this linear to something, and how many ops are
    taken.
    """
    taken = len(group)
    after = lowering.program.ops[position + taken] if position + taken < len(lowering.program.ops) else None
    output = group[0].output
    if taken > 1 or after is None or after.name != "add" or output not in after.inputs:
        return None, taken
    others = [value for value in after.inputs if value != output]
    if lowering.last_use[output.index] == position + 1 and len(others) == 1:
        return others[0], taken + 1
    return None, taken


def _bias_of(lowering: Lowering, group: list[Op], matrices) -> np.ndarray | None:
    if not any(op.bias for op in group):
        return None
    parts = []
    for op, matrix in zip(group, matrices):
        length = panels_of(matrix.rows) * PANEL_ROWS
        parts.append(
            lowering.machine.weights.vectors[op.bias.name] if op.bias else np.zeros(length, np.float32)
        )
    return np.concatenate(parts)


def prepare(lowering: Lowering, value: Value, x: Buffer) -> Buffer:
    """The quantized form of a value, made once for all linears that read it."""
    if value.index not in lowering.prepared:
        lowering.prepared[value.index] = quantized(lowering, x, value.width)
    return lowering.prepared[value.index]


def quantized(lowering: Lowering, x: Buffer, width: int) -> Buffer:
    """The first `width` columns of x as `pyinfer.cpu.linear.prepared_parts`."""
    capacity = 1 if lowering.single else -(-lowering.capacity[lowering.count] // 8) * 8
    out = lowering.new(kernels.prepared_bytes(width, capacity), 0, shared=False)
    lowering.row_op(rows.quantize, width, [x], out, TILE=lowering.tile[lowering.count])
    return out
