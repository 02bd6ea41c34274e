"""Runs a program on the CPU: KV cache, rope tables, and one lowered plan per class of steps, made when first
needed.
"""

from __future__ import annotations

import numpy as np

from pyinfer.cpu import attention
from pyinfer.cpu.lowering import MOST_BY_ROWS, Lowering, Machine, Plan
from pyinfer.cpu.observe import Observed
from pyinfer.cpu.step import ATTEND_ROWS, Step, tile_of
from pyinfer.cpu.weights import Weights
from pyinfer.jit.buffers import allocate
from pyinfer.jit.levels import TILES, level
from pyinfer.jit.team import ITEMS, Team
from pyinfer.program.program import NEURON_MAJOR, Program
from pyinfer.program.rope import Rope
from pyinfer.program.sparsity import STATS

PREFILL_ATTEND_ROWS = 8
TABLE_ROWS = 4096


class Executor:
    """Steps of up to `capacity` rows over `n_sequences` sequences of up to n_ctx positions each."""

    def __init__(
        self, program: Program, weights: Weights, team: Team, n_ctx: int, n_sequences: int, capacity: int
    ) -> None:
        self.program, self.capacity, self.n_sequences = program, capacity, n_sequences
        self._team = team
        self._step = Step(capacity)
        self._plans: dict[tuple[int, int, bool], Plan] = {}
        self._skips = any(op.name in NEURON_MAJOR or op.params.get("what") in STATS for op in program.ops)
        self._shape: tuple | None = None
        cache = program.cache
        element_bytes = attention.element_bytes_of({each.name: each.type for each in program.weights()})
        head_bytes = attention.head_bytes(cache.head_size, n_ctx, element_bytes)
        layer_bytes = head_bytes * cache.kv_heads * n_sequences
        self.cache_bytes = 2 * layer_bytes * cache.layers
        self._memory = allocate(self.cache_bytes, huge=False)
        start = self._memory.ctypes.data
        keys = [start + 2 * layer * layer_bytes for layer in range(cache.layers)]
        ropes = {op.params["rope"] for op in program.ops if op.name == "rope"}
        tables = {rope: _table(rope, n_ctx) for rope in ropes}
        values = [key + layer_bytes for key in keys]
        self.observed = Observed(program, team.n_threads, capacity)
        self._machine = Machine(
            team.n_threads, weights, keys, values, head_bytes, element_bytes, tables, self.observed
        )

    def _plan(self, n_rows: int, n_wanted: int) -> Plan:
        by_rows = self._skips and n_rows <= MOST_BY_ROWS
        tiles = tile_of(n_rows), tile_of(n_wanted)
        key = *tiles, by_rows
        if key not in self._plans:
            many, most = TILES[level.get()][1], min(self.capacity, MOST_BY_ROWS) if by_rows else self.capacity
            capacity = [min(most, tile if tile < many else most) for tile in tiles]
            self._plans[key] = Lowering(self.program, self._machine, *capacity, *tiles).lower()
        return self._plans[key]

    def step(self, tokens, positions, sequences, wanted) -> np.ndarray:
        """Run rows of (token, position, sequence); float32 [wanted, vocabulary], the caller's own.

        Rows of one sequence must be consecutive and in order of position, or every row be of another
        sequence.
        """
        step, n_rows, n_wanted = self._step, len(tokens), len(wanted)
        step.fill(tokens, positions, sequences, wanted)
        self.observed.n_rows = n_rows
        self.observed.few_rows += n_rows if n_rows <= MOST_BY_ROWS else 0
        plan = self._plan(n_rows, n_wanted)
        together = PREFILL_ATTEND_ROWS if n_rows > 1 and sequences[0] == sequences[-1] else 1
        step.block[ATTEND_ROWS] = together
        shape = (id(plan), n_rows, n_wanted, together)
        if shape != self._shape:
            self._set_items(plan, n_rows, n_wanted, together)
            self._shape = shape
        self._team.run(plan.instructions, step.block)
        if not n_wanted:
            return np.empty((0, self.program.vocab_size), np.float32)
        return self._logits(plan, n_wanted)

    def _set_items(self, plan: Plan, n_rows: int, n_wanted: int, together: int) -> None:
        for row, (kind, number) in zip(plan.instructions, plan.count_of):
            row[ITEMS] = {
                "panels": number,
                "rows": n_rows,
                "wanted": n_wanted,
                "store": number * n_rows,
                "attend": attention.attend_items(number, n_rows, together),
            }[kind]

    def _logits(self, plan: Plan, n_wanted: int) -> np.ndarray:
        buffer = plan.logits
        raw = (np.ctypeslib.ctypes.c_float * (buffer.stride // 4 * n_wanted)).from_address(buffer.address)
        return np.frombuffer(raw, np.float32).reshape(n_wanted, -1)[:, : self.program.vocab_size].copy()


def _table(rope: Rope, n_ctx: int) -> np.ndarray:
    """float32 [n_ctx, dimension_count / 2, 2], made in parts: the float64 of a long context would be
    large.
    """
    table = np.empty((n_ctx, rope.dimension_count // 2, 2), np.float32)
    for first in range(0, n_ctx, TABLE_ROWS):
        positions = np.arange(first, min(first + TABLE_ROWS, n_ctx))
        table[positions] = rope.table(positions)
    return table
