"""Programs of one or two ops, run by the cpu executor and by the reference.

A program ends with a linear, so an op under test is followed by one with the identity matrix in float32,
which changes nothing.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from block_samples import float_tensor
from golden_files import dequantize

from pyinfer.cpu.executor import Executor
from pyinfer.cpu.weights import Weights
from pyinfer.gguf_file import Tensor
from pyinfer.jit.team import Team
from pyinfer.program.program import Cache, Op, Program, Value
from pyinfer.program.reference import Reference


class Ops:
    """Collects ops as pyinfer.program.program defines them, without a family and a file."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def emit(
        self,
        name: str,
        inputs: tuple[Value, ...],
        width: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        **params,
    ):
        output = Value(len(self.ops), width) if width else None
        self.ops.append(Op(name, inputs, output, weight, bias, params))
        return output

    def rows(self, name: str, table: np.ndarray) -> Value:
        """Row `token` of a table, as it is."""
        return self.emit("embed", (), table.shape[1], float_tensor(name, table), scale=1.0)

    def finish(self, x: Value, cache: Cache = Cache(1, 1, 16)) -> Program:  # noqa: B008  a frozen value
        self.emit("linear", (x,), x.width, float_tensor("identity", np.eye(x.width)))
        return Program(tuple(self.ops), cache, x.width)


class Both:
    """The same steps through both executors."""

    def __init__(
        self, program: Program, team: Team, n_ctx: int = 64, n_sequences: int = 1, capacity: int = 40
    ) -> None:
        file = SimpleNamespace(path="test.gguf", drop_pages=lambda tensor: None)
        self._weights = Weights(program, file, team)
        self.cpu = Executor(program, self._weights, team, n_ctx, n_sequences, capacity)
        self.reference = Reference(program, dequantize)

    def step(self, tokens, positions=None, sequences=None, wanted=None) -> tuple[np.ndarray, np.ndarray]:
        """(cpu, reference) outputs; by default all rows of sequence 0 from position 0."""
        n = len(tokens)
        rows = [
            np.asarray(tokens),
            np.arange(n) if positions is None else np.asarray(positions),
            np.zeros(n, int) if sequences is None else np.asarray(sequences),
            np.arange(n) if wanted is None else np.asarray(wanted, int),
        ]
        return self.cpu.step(*rows), self.reference.step(*rows)
