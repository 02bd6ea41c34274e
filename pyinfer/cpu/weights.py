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
from pyinfer.program.program import Program
from pyinfer.quants import panels, quant
from pyinfer.quants.panels import PANEL_ROWS, Layout, panels_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Matrix:
    """One matrix in panels; address and strides in bytes."""

    layout: Layout
    address: int
    rows: int
    columns: int

    @property
    def panel_stride(self) -> int:
        return self.layout.panel_bytes(self.columns)

    @property
    def end(self) -> int:
        return self.address + panels_of(self.rows) * self.panel_stride


class Weights:
    """matrices by tensor name; vectors (float32, padded with zeros to 16) by tensor name; nbytes of all."""

    def __init__(
        self, program: Program, file: GGUFFile, team: Team, progress: Progress | None = None
    ) -> None:
        tensors = program.weights()
        for op in program.ops:
            if op.name in ("linear", "embed"):
                _check(op.weight, file)
        sizes = [quant(tensor.type).LAYOUT.matrix_bytes(tensor.rows, tensor.columns) for tensor in tensors]
        self.nbytes = sum(sizes)
        self._arena = allocate(self.nbytes)
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, np.ndarray] = {}
        address, done, total = self._arena.ctypes.data, 0, sum(tensor.nbytes for tensor in tensors)
        for tensor, size in zip(tensors, sizes):
            self.matrices[tensor.name] = _pack(tensor, address, team)
            file.drop_pages(tensor)
            address, done = address + size, done + tensor.nbytes
            if progress:
                progress(done, total)
        for op in program.ops:
            for tensor in (op.weight if op.name == "rms_norm" else None, op.bias):
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


def _pack(tensor: Tensor, address: int, team: Team) -> Matrix:
    file = quant(tensor.type)
    matrix = Matrix(file.LAYOUT, address, tensor.rows, tensor.columns)
    operands = np.zeros(panels.OPERANDS, np.int64)
    operands[panels.SOURCE], operands[panels.TARGET] = tensor.data.ctypes.data, address
    operands[panels.ROWS], operands[panels.COLUMNS] = tensor.rows, tensor.columns
    operands[panels.PANEL_STRIDE] = matrix.panel_stride
    team.run(single_instruction(file.pack, operands, panels_of(tensor.rows)), np.zeros(1, np.int64))
    return matrix


def vector(tensor: Tensor) -> np.ndarray:
    """float32 [elements, rounded up to 16] of an F32, F16 or BF16 tensor."""
    if tensor.type == GGMLType.BF16:
        numbers = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = tensor.data.view(np.float16 if tensor.type == GGMLType.F16 else np.float32)
    out = np.zeros(panels_of(numbers.size) * PANEL_ROWS, np.float32)
    out[: numbers.size] = numbers
    return out
