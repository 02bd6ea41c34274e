"""Lowering of linears whose weights are kept neuron by neuron: few rows skip neurons, many rows make
panels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyinfer.cpu import gather, linear_t_many, rows
from pyinfer.cpu import linear as kernels
from pyinfer.cpu import linear_at as kernels_at
from pyinfer.cpu import linear_t as kernels_t
from pyinfer.cpu.gather import ABOVE, NOT_ZERO, REACHING
from pyinfer.cpu.lower_linear import linear_operands, prepare, quantized, residual_of
from pyinfer.cpu.scratch import Buffer
from pyinfer.cpu.weights import Matrix
from pyinfer.jit.kernel import Kernel
from pyinfer.jit.team import DYNAMIC, STATIC
from pyinfer.program.program import Op
from pyinfer.quants.panels import PANEL_ROWS, U8, Layout, panels_of

if TYPE_CHECKING:
    from pyinfer.cpu.lowering import Lowering

POWER = {"relu": 1, "fatrelu": 1, "relu2": 2}  # of what is above 0, or above the threshold


def linear_rows(lowering: Lowering, op: Op, position: int) -> None:
    """A `linear` whose weights are kept neuron by neuron."""
    linear_at(lowering, op, position)


def activated(lowering: Lowering, op: Op, position: int) -> int:
    """An activation that is only the mask of the next op becomes part of it; returns how many ops it took.

    Saves a pass over all neurons in every thread: of a 7B layer with 10 % of them active a tenth.
    """
    ops = lowering.program.ops
    after = ops[position + 1] if position + 1 < len(ops) else None
    name, _, threshold = op.params["activation"].partition(":")
    if (
        name not in POWER
        or not lowering.by_rows
        or after is None
        or after.name != "linear_at"
        or not after.params["times"]
        or after.inputs[1] != op.output
        or after.inputs[0] == op.output
        or lowering.last_use[op.output.index] != position + 1
    ):
        return 0
    mask = lowering.input(op)
    _linear_at(lowering, after, mask, ABOVE, lowering.constant(float(threshold or 0)), POWER[name])
    return 2


def linear_at(lowering: Lowering, op: Op, position: int) -> None:
    thresholds = op.params["thresholds"]
    if not lowering.by_rows:
        _linear_at(lowering, op, None, NOT_ZERO, 0, int(op.params["times"]))
    elif thresholds is None:
        _linear_at(lowering, op, lowering.input(op, 1), NOT_ZERO, 0, int(op.params["times"]))
    else:
        padded = np.full(panels_of(op.output.width) * PANEL_ROWS, np.inf, np.float32)
        padded[: op.output.width] = thresholds
        lowering.keep.append(padded)
        _linear_at(lowering, op, lowering.input(op, 1), REACHING, padded.ctypes.data, int(op.params["times"]))


def _linear_at(lowering: Lowering, op: Op, mask: Buffer | None, rule: int, bound: int, power: int) -> None:
    """For few rows by the mask (see `pyinfer.cpu.linear_at.linear_at`), for many all."""
    matrix = lowering.machine.weights.matrices[op.weight.name]
    x = lowering.input(op)
    source = x if matrix.layout.is_float else prepare(lowering, op.inputs[0], x)
    out = lowering.output(op, shared=True)
    operands = np.zeros(kernels_at.OPERANDS, np.int64)
    operands[: kernels.OPERANDS] = linear_operands(lowering, matrix, source, out)
    operands[kernels_at.WIDTH], operands[kernels_at.BIAS] = matrix.rows, _bias(lowering, op)
    operands[kernels_at.BOUND] = bound
    if mask is None:
        _all(lowering, op, matrix, operands, source, out)
    else:
        kernel = kernels_at.linear_at(matrix.layout, lowering.tile[lowering.count], rule, power)
        _few(lowering, kernel, matrix, operands, [source, mask], out)


def _few(
    lowering: Lowering, kernel: Kernel, matrix: Matrix, operands, reads: list[Buffer], out: Buffer
) -> None:
    width, mask = panels_of(matrix.rows) * PANEL_ROWS, reads[1]
    operands[kernels_at.MASK : kernels_at.MASK + 3] = mask.address, mask.stride, mask.private
    parts = {
        kernels_at.TABLE: 2 * 8 * PANEL_ROWS,
        kernels_at.RESULT: 4 * PANEL_ROWS * (-(-lowering.capacity[lowering.count] // 8) * 8),
        kernels_at.LISTING: 4 * width,
        kernels_at.PANEL: gather.gathered_bytes(matrix.layout, matrix.columns) + kernels_at.BLOCK_BYTES,
    }
    operands[kernels_at.SCRATCH : kernels_at.SCRATCH + 2] = _scratch(lowering, operands, parts)
    operands[kernels_at.SLOTS] = lowering.machine.n_threads
    items = ("panels", lowering.machine.n_threads)
    lowering.emit(kernel, operands, items, STATIC, reads, out)


def _all(lowering: Lowering, op: Op, matrix: Matrix, operands, source: Buffer, out: Buffer) -> None:
    """Every neuron, then times the mask; a guess is not needed."""
    parts = {
        kernels_at.TABLE: 2 * 8 * PANEL_ROWS,
        kernels_at.PANEL: gather.gathered_bytes(matrix.layout, matrix.columns),
    }
    inner = operands[: kernels.OPERANDS].copy()
    _inner(lowering, (operands, kernels_at.LINEAR), matrix.layout, inner, parts)
    items = ("panels", panels_of(matrix.rows))
    lowering.emit(kernels_at.linear_rows(matrix.layout), operands, items, DYNAMIC, [source], out)
    if op.params["times"]:
        product = lowering.output(op)
        lowering.row_op(rows.multiply, op.output.width, [out, lowering.input(op, 1)], product)
        lowering.free(out)


def linear_t(lowering: Lowering, op: Op, position: int) -> int:
    residual, taken = residual_of(lowering, [op], position)
    matrix = lowering.machine.weights.matrices[op.weight.name]
    inputs = [lowering.input(op, n) for n in range(len(op.inputs))]
    joined = matrix.layout.is_float and len(inputs) > 1
    if joined:
        inputs = [_side_by_side(lowering, inputs, op)]
    out = lowering.new_rows(op.output.width, shared=True)
    lowering.buffers[op.output.index] = out
    operands = np.zeros(linear_t_many.OPERANDS, np.int64)
    operands[kernels_t.WEIGHT], operands[kernels_t.STRIDE] = matrix.address, matrix.stride
    operands[kernels_t.FEATURES], operands[kernels_t.WIDTH] = matrix.rows, matrix.columns
    operands[kernels_t.COUNT], operands[kernels_t.BIAS] = lowering.count, _bias(lowering, op)
    for first, x in zip((kernels_t.X, kernels_t.MORE), inputs):
        operands[first : first + 3] = x.address, x.stride, x.private
    if len(inputs) > 1:
        operands[kernels_t.FEATURES] = op.inputs[0].width
        operands[kernels_t.MORE_FEATURES] = op.inputs[1].width
    operands[kernels_t.OUT], operands[kernels_t.OUT_STRIDE] = out.address, out.stride
    others = []
    if residual is not None:
        buffer = lowering.buffers[residual.index]
        operands[kernels_t.RESIDUAL : kernels_t.RESIDUAL + 3] = buffer.address, buffer.stride, buffer.private
        others.append(buffer)
        lowering.buffers[lowering.program.ops[position + 1].output.index] = out
    if lowering.by_rows:
        _skipping(lowering, matrix, operands, [*inputs, *others], out)
    elif matrix.layout.is_float:
        _columns(lowering, matrix, operands, [*inputs, *others], out)
    else:
        widths = [value.width for value in op.inputs]
        _slabs(lowering, matrix, operands, list(zip(inputs, widths)), others, out)
    if joined:
        lowering.free(inputs[0])
    return taken


def _side_by_side(lowering: Lowering, inputs: list[Buffer], op: Op) -> Buffer:
    """The inputs of an op as one."""
    out, start = lowering.new_rows(sum(value.width for value in op.inputs), shared=False), 0
    for value, source in zip(op.inputs, inputs):
        one = lowering.constant(1.0)
        lowering.row_op(rows.scale, value.width, [source], out.view(4 * start), NUMBER=one)
        start += value.width
    return out


def _skipping(lowering: Lowering, matrix: Matrix, operands, reads: list[Buffer], out: Buffer) -> None:
    spans = -(-matrix.columns // kernels_t.span_of(matrix.layout))
    parts = {
        kernels_t.LISTING: 4 * (panels_of(matrix.rows) + 1) * PANEL_ROWS,
        kernels_t.TABLES: kernels_t.tables_bytes(lowering.capacity[lowering.count]),
    }
    n_bytes = kernels_t.sums_bytes(matrix.layout) * spans * lowering.capacity[lowering.count]
    sums = lowering.new(n_bytes, 0, shared=True)
    operands[kernels_t.LISTING : kernels_t.LISTING + 2] = _scratch(lowering, operands, parts)
    operands[kernels_t.SUMS] = sums.address
    lowering.emit(kernels_t.linear_t(matrix.layout), operands, ("panels", spans), STATIC, reads, out)
    lowering.free(sums)


def _columns(lowering: Lowering, matrix: Matrix, operands, reads: list[Buffer], out: Buffer) -> None:
    inner = linear_operands(lowering, matrix, reads[0], out)
    inner[kernels.COLUMNS] = matrix.rows
    inner[kernels.RESIDUAL_STRIDE], inner[kernels.RESIDUAL_PRIVATE] = operands[
        kernels_t.RESIDUAL_STRIDE : kernels_t.RESIDUAL_PRIVATE + 1
    ]
    operands[linear_t_many.NEURONS] = matrix.rows
    parts = {linear_t_many.PANELS: matrix.rows * PANEL_ROWS * matrix.layout.bits // 8}
    _inner(lowering, (operands, linear_t_many.LINEAR), matrix.layout, inner, parts)
    items = ("panels", panels_of(matrix.columns))
    lowering.emit(linear_t_many.columns(matrix.layout), operands, items, DYNAMIC, reads, out)


def _slabs(
    lowering: Lowering, matrix: Matrix, operands, inputs: list[tuple[Buffer, int]], others, out: Buffer
) -> None:
    """inputs : parts of x, and how many elements they have"""
    span = kernels_t.span_of(matrix.layout)
    spans = -(-matrix.columns // span)
    sums = lowering.new_rows(spans * span, shared=True)
    operands[kernels_t.SUMS], operands[linear_t_many.SUM_STRIDE] = sums.address, sums.stride
    parts = {
        linear_t_many.VALUES: linear_t_many.values_bytes(matrix.layout),
        linear_t_many.PANELS: linear_t_many.panels_bytes(matrix.layout),
    }
    starts = np.cumsum([0, *(width for _, width in inputs)])
    for first, x, neurons in [
        (int(start) + at, x.view(4 * at), min(linear_t_many.SLAB, width - at))
        for start, (x, width) in zip(starts, inputs)
        for at in range(0, width, linear_t_many.SLAB)
    ]:
        slab = operands.copy()
        source = quantized(lowering, x, neurons)
        slab[linear_t_many.FIRST], slab[linear_t_many.NEURONS] = first, neurons
        inner = linear_operands(lowering, matrix, source, sums)
        inner[kernels.RESIDUAL_STRIDE] = sums.stride
        _inner(lowering, (slab, linear_t_many.LINEAR), U8, inner, parts)
        before = [source, sums] if first else [source]
        lowering.emit(linear_t_many.slab(matrix.layout), slab, ("panels", spans), DYNAMIC, before, sums)
        lowering.free(source)
    lowering.row_kernel(linear_t_many.finish(matrix.layout), operands, [sums, *others], out)
    lowering.free(sums)


def _bias(lowering: Lowering, op: Op) -> int:
    if op.bias is None:
        return 0
    bias = lowering.machine.weights.vectors[op.bias.name]
    lowering.keep.append(bias)
    return bias.ctypes.data


def _scratch(lowering: Lowering, operands: np.ndarray, parts: dict[int, int]) -> tuple[int, int]:
    """Thread scratch of these parts (operand -> bytes), whose places are written; its address and bytes."""
    n_bytes = 0
    for index, size in parts.items():
        operands[index] = n_bytes
        n_bytes += (size + 63) // 64 * 64
    return lowering.thread_scratch(n_bytes)


def _inner(
    lowering: Lowering, place: tuple[np.ndarray, int], layout: Layout, inner: np.ndarray, parts: dict
) -> None:
    """Give every thread scratch and operands for the linear kernel, whose panels are the last of the parts.

    place : operands, and where LINEAR, INNER, SCRATCH and SCRATCH_BYTES stand in them
    """
    operands, first = place
    address, stride = _scratch(lowering, operands, parts)
    each = np.zeros((lowering.machine.n_threads, kernels_at.INNER_BYTES // 8), np.int64)
    each[:, : kernels.OPERANDS] = inner
    each[:, kernels.WEIGHT] = address + stride * np.arange(len(each)) + operands[list(parts)[-1]]
    lowering.keep.append(each)
    kernel = kernels.linear(layout, lowering.tile[lowering.count])
    operands[first : first + 4] = kernel.address, each.ctypes.data, address, stride
