"""Lowering of attention: what is stored to the KV cache, and what is read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyinfer.cpu import attention
from pyinfer.cpu.scratch import Buffer
from pyinfer.cpu.step import ROWS
from pyinfer.jit.buffers import allocate
from pyinfer.jit.levels import TILES, level
from pyinfer.jit.team import DYNAMIC, STATIC
from pyinfer.program.program import Op

if TYPE_CHECKING:
    from pyinfer.cpu.lowering import Lowering


def store(lowering: Lowering, op: Op, position: int) -> None:
    k, v = lowering.input(op), lowering.input(op, 1)
    operands = _attention_operands(lowering, op)
    operands[attention.K : attention.K + 3] = k.address, k.stride, k.private
    operands[attention.V : attention.V + 3] = v.address, v.stride, v.private
    operands[attention.HEAD_SIZE] = op.inputs[0].width // op.params["kv_heads"]
    cache = Buffer(0, 0, 0, 0)  # stands for the cache of the layer: attention must wait for it
    kernel, items = attention.store(lowering.machine.element_bytes), ("store", op.params["kv_heads"])
    lowering.emit(kernel, operands, items, STATIC, [k, v], cache)
    lowering.stored = cache


def attend(lowering: Lowering, op: Op, position: int) -> None:
    q, out, params = lowering.input(op), lowering.output(op, shared=True), op.params
    operands = _attention_operands(lowering, op)
    operands[attention.Q : attention.Q + 3] = q.address, q.stride, q.private
    operands[attention.OUT], operands[attention.OUT_STRIDE] = out.address, out.stride
    operands[attention.HEADS], operands[attention.HEAD_SIZE] = params["heads"], params["head_size"]
    operands[attention.WINDOW], operands[attention.SCALE] = (
        params["window"],
        lowering.constant(params["scale"]),
    )
    each = attention.scratch_bytes(params["head_size"])
    scratch = allocate(each * lowering.machine.n_threads)
    lowering.keep.append(scratch)
    operands[attention.SCRATCH], operands[attention.SCRATCH_BYTES] = scratch.ctypes.data, each
    group = params["heads"] // params["kv_heads"]
    few, many = TILES[level.get()]
    tile = many if lowering.tile[ROWS] == many or group > few else few if group > 1 else 1
    mode = STATIC if lowering.single else DYNAMIC
    kernel, items = attention.attend(tile, lowering.machine.element_bytes), ("attend", params["kv_heads"])
    lowering.emit(kernel, operands, items, mode, [q, lowering.stored], out)


def _attention_operands(lowering: Lowering, op: Op) -> np.ndarray:
    operands = np.zeros(attention.OPERANDS, np.int64)
    layer, machine = op.params["layer"], lowering.machine
    operands[attention.KEYS], operands[attention.VALUES] = machine.keys[layer], machine.values[layer]
    operands[attention.HEAD_BYTES], operands[attention.KV_HEADS] = (
        machine.head_bytes,
        op.params["kv_heads"],
    )
    return operands
