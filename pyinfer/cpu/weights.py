"""A program's weights in runtime layouts: every matrix in one arena, in the order in which the program reads
them.

Matrices that follow each other with the same layout and columns lie back to back, so that q, k and v (or gate
and up) are one linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyinfer.cpu.team_program import single_instruction
from pyinfer.errors import UnsupportedError
from pyinfer.gguf_file import GGUFFile, Tensor
from pyinfer.jit.buffers import allocate
from pyinfer.jit.team import Team
from pyinfer.names import GGMLType
from pyinfer.program.program import LINEARS, NEURON_MAJOR, Program
from pyinfer.quants import neuron_rows, panels, quant
from pyinfer.quants.panels import PANEL_ROWS, Layout, panels_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Matrix:
    """One matrix in panels, or row by row (`by_rows`); address and stride (of a panel or row) in bytes."""

    layout: Layout
    address: int
    rows: int
    columns: int
    by_rows: bool = False

    @property
    def stride(self) -> int:
        sizes = neuron_rows.row_bytes if self.by_rows else Layout.panel_bytes
        return sizes(self.layout, self.columns)

    @property
    def n_bytes(self) -> int:
        """Rounded up to whole cache lines."""
        count = self.rows if self.by_rows else panels_of(self.rows)
        return (count * self.stride + 63) // 64 * 64

    @property
    def end(self) -> int:
        return self.address + self.n_bytes


class Weights:
    """matrices by tensor name; vectors (float32, padded with zeros to 16) by tensor name; nbytes of all."""

    def __init__(
        self, program: Program, file: GGUFFile, team: Team, progress: Progress | None = None
    ) -> None:
        for op in program.ops:
            if op.name in (*LINEARS, "embed", "embed_position"):
                _check(op.weight, file)
        by_rows = {op.weight.name for op in program.ops if op.name in NEURON_MAJOR}
        tensors = program.weights()
        shapes = [
            (quant(each.type).LAYOUT, each.rows, each.columns, each.name in by_rows) for each in tensors
        ]
        self.nbytes = sum(Matrix(layout, 0, *shape).n_bytes for layout, *shape in shapes)
        self._arena = allocate(self.nbytes)
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, np.ndarray] = {}
        address, done, total = self._arena.ctypes.data, 0, sum(tensor.nbytes for tensor in tensors)
        for tensor, (layout, *shape) in zip(tensors, shapes):
            matrix = Matrix(layout, address, *shape)
            (_unpack_rows if matrix.by_rows else _pack)(tensor, matrix, team)
            self.matrices[tensor.name] = matrix
            file.drop_pages(tensor)
            address, done = matrix.end, done + tensor.nbytes
            if progress:
                progress(done, total)
        for op in program.ops:
            for tensor in (op.weight if op.name in ("rms_norm", "layer_norm") else None, op.bias):
                if tensor is not None and tensor.name not in self.vectors:
                    self.vectors[tensor.name] = vector(tensor)


def _check(tensor: Tensor, file: GGUFFile) -> None:
    try:
        layout = quant(tensor.type).LAYOUT
    except UnsupportedError as error:
        raise UnsupportedError(f"{file.path}: {tensor.name}: {error}") from error
    if not layout.is_float and tensor.columns % 32:
        found = f"{tensor.columns} columns of {tensor.type.name}"
        raise UnsupportedError(f"{file.path}: {tensor.name} has {found}, expected a multiple of 32")


def _operands(tensor: Tensor, data: np.ndarray, matrix: Matrix, count: int) -> np.ndarray:
    operands = np.zeros(count, np.int64)
    operands[panels.SOURCE], operands[panels.TARGET] = data.ctypes.data, matrix.address
    operands[panels.ROWS], operands[panels.COLUMNS] = tensor.rows, tensor.columns
    operands[panels.PANEL_STRIDE] = matrix.layout.panel_bytes(tensor.columns)
    return operands


def _pack(tensor: Tensor, matrix: Matrix, team: Team) -> None:
    data = tensor.data  # of a part a copy, which must live until it is packed
    operands = _operands(tensor, data, matrix, panels.OPERANDS)
    program = single_instruction(quant(tensor.type).pack, operands, panels_of(tensor.rows))
    team.run(program, np.zeros(1, np.int64))


def _unpack_rows(tensor: Tensor, matrix: Matrix, team: Team) -> None:
    data = tensor.data
    operands = _operands(tensor, data, matrix, neuron_rows.OPERANDS)
    each = neuron_rows.scratch_bytes(matrix.layout, tensor.columns)
    scratch = allocate(each * team.n_threads)
    operands[neuron_rows.PACK] = quant(tensor.type).pack.address
    operands[neuron_rows.SOURCE_ROW_BYTES] = tensor.nbytes // tensor.rows
    operands[neuron_rows.ROW_STRIDE] = matrix.stride
    operands[neuron_rows.SCRATCH], operands[neuron_rows.SCRATCH_BYTES] = scratch.ctypes.data, each
    kernel = neuron_rows.rows_from_blocks(matrix.layout)
    team.run(single_instruction(kernel, operands, panels_of(tensor.rows)), np.zeros(1, np.int64))


def vector(tensor: Tensor) -> np.ndarray:
    """float32 [elements, rounded up to 16] of an F32, F16 or BF16 tensor."""
    if tensor.type == GGMLType.BF16:
        numbers = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = tensor.data.view(np.float16 if tensor.type == GGMLType.F16 else np.float32)
    out = np.zeros(panels_of(numbers.size) * PANEL_ROWS, np.float32)
    out[: numbers.size] = numbers
    return out
