"""Lowering of the operations on rows: one function per operation, named like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyinfer.cpu import activations, embedding, norms, rows
from pyinfer.cpu import observe as kernels
from pyinfer.cpu.lower_neurons import activated
from pyinfer.cpu.scratch import PRIVATE, Buffer
from pyinfer.cpu.step import WANTED
from pyinfer.jit.buffers import allocate
from pyinfer.jit.kernel import Kernel
from pyinfer.jit.team import STATIC
from pyinfer.program.program import Op
from pyinfer.quants import quant

if TYPE_CHECKING:
    from pyinfer.cpu.lowering import Lowering


def embed(lowering: Lowering, op: Op, position: int) -> None:
    _from_matrix(lowering, op, embedding.embed, [], 0)


def embed_position(lowering: Lowering, op: Op, position: int) -> None:
    _from_matrix(lowering, op, embedding.embed_position, [lowering.input(op)], op.params["offset"])


def rms_norm(lowering: Lowering, op: Op, position: int) -> None:
    _norm(lowering, norms.rms_norm, op, op.params["heads"])


def layer_norm(lowering: Lowering, op: Op, position: int) -> None:
    _norm(lowering, norms.layer_norm, op, 1)


def rope(lowering: Lowering, op: Op, position: int) -> None:
    rope, heads = op.params["rope"], op.params["heads"]
    extra = {
        "TABLE": lowering.machine.tables[rope].ctypes.data,
        "HEAD_SIZE": op.output.width // heads,
        "ROTATED": rope.dimension_count,
        "NEOX": rope.neox,
        "ROPE_HEADS": heads,
    }
    lowering.row_op(rows.rope, op.output.width, [lowering.input(op)], lowering.output(op), **extra)


def gate(lowering: Lowering, op: Op, position: int) -> None:
    _activation(lowering, activations.gate, op)


def activate(lowering: Lowering, op: Op, position: int) -> int:
    taken = activated(lowering, op, position)
    if not taken:
        _activation(lowering, activations.activate, op)
    return taken or 1


def scale(lowering: Lowering, op: Op, position: int) -> None:
    at = lowering.constant(op.params["factor"])
    lowering.row_op(rows.scale, op.output.width, [lowering.input(op)], lowering.output(op), NUMBER=at)


def keep(lowering: Lowering, op: Op, position: int) -> None:
    at = lowering.constant(op.params["least"])
    lowering.row_op(activations.keep, op.output.width, [lowering.input(op)], lowering.output(op), NUMBER=at)


def observe(lowering: Lowering, op: Op, position: int) -> None:
    """Once for every row, by whichever thread has it: unlike other row operations also in a step of one."""
    array = lowering.machine.observed.array(op.params["what"], op.params["layer"])
    lowering.keep.append(array)
    x = lowering.input(op)
    operands = lowering.row_operands(op.inputs[0].width, [x], None)
    operands[kernels.COUNTERS], operands[kernels.COUNTER_BYTES] = array.ctypes.data, array.strides[0]
    lowering.emit(kernels.kernel_for(op.params["what"]), operands, ("rows", 1), STATIC, [x], None)


def slices(lowering: Lowering, op: Op, position: int) -> None:
    lowering.buffers[op.output.index] = lowering.input(op).view(4 * op.params["start"])


def add(lowering: Lowering, op: Op, position: int) -> None:
    lowering.row_op(
        rows.add, op.output.width, [lowering.input(op), lowering.input(op, 1)], lowering.output(op)
    )


def select(lowering: Lowering, op: Op, position: int) -> None:
    source = lowering.input(op)
    if source.whole.written != PRIVATE:
        lowering.barrier()
    lowering.count = WANTED
    lowering.row_op(rows.select, op.output.width, [source], lowering.output(op))


def _from_matrix(lowering: Lowering, op: Op, kernel_of, inputs: list[Buffer], offset: int) -> None:
    tensor, file = op.weight, quant(op.weight.type)
    panel_bytes = file.LAYOUT.panel_bytes(tensor.columns)
    panel = allocate((panel_bytes + 64) * lowering.machine.n_threads)
    lowering.keep.append(panel)
    extra = {
        "PACK": file.pack.address,
        "DATA": tensor.data.ctypes.data,
        "ROW_BYTES": tensor.columns // file.BLOCK * file.BLOCK_BYTES,
        "PANEL": panel.ctypes.data,
        "PANEL_BYTES": panel_bytes,
        "SCALE": lowering.constant(op.params["scale"]),
        "OFFSET": offset,
    }
    lowering.row_op(kernel_of(file.LAYOUT), op.output.width, inputs, lowering.output(op), **extra)


def _norm(lowering: Lowering, kernel: Kernel, op: Op, heads: int) -> None:
    vectors = lowering.machine.weights.vectors
    extra = {
        "WEIGHT": vectors[op.weight.name].ctypes.data,
        "BIAS": vectors[op.bias.name].ctypes.data if op.bias else 0,
        "EPSILON": lowering.constant(op.params["epsilon"]),
        "HEADS": heads,
    }
    lowering.row_op(kernel, op.output.width, [lowering.input(op)], lowering.output(op), **extra)


def _activation(lowering: Lowering, kernel_of, op: Op) -> None:
    name, _, threshold = op.params["activation"].partition(":")
    inputs = [lowering.buffers[value.index] for value in op.inputs]
    at = lowering.constant(float(threshold or 0))
    lowering.row_op(kernel_of(name), op.output.width, inputs, lowering.output(op), NUMBER=at)
