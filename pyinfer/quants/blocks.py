"""Quantizing: rows of float32, float16 or bfloat16 become blocks of a GGUF type, by all threads of a team.

A type's file has `quantize`, a kernel whose items are rows. The types that gguf's Python package can write
equal it bit for bit, but where a block's minimum is 0 and has zeros of both signs (there NumPy's depends on
the processor): ours is -0.
"""

from __future__ import annotations

import numpy as np

from pyinfer.errors import FormatError
from pyinfer.jit.exact import bfloat_to_float, exact, greater_u32, magnitude_of
from pyinfer.jit.memory import f32_at, half_to_float, i64_at, u16_at
from pyinfer.jit.simd import load_bf16x16, load_f16x16, load_f32x16
from pyinfer.jit.team import DYNAMIC, FIELDS, Team
from pyinfer.names import BLOCK, GGMLType
from pyinfer.quants import quant

# Operands of every quantize kernel (int64). STATUS: one int64 per thread, a cache line apart; SCRATCH: so
# many bytes per thread, for the types that search.
SOURCE, TARGET, COLUMNS, KIND, STATUS, SCRATCH = range(6)
OPERANDS = 6
THREAD_BYTES = 64
SCRATCH_BYTES = 1 << 16
KIND_OF = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
F32, F16, BF16 = range(3)

NOT_FINITE, OVERFLOW = 1, 2  # bits of a status
INFINITY_BITS = 0x7F800000
MOST_SEARCHED = 1e8  # magnitude; scales of blocks are halves, so far smaller numbers are refused already


def quantize_rows(
    type_: GGMLType, values: np.ndarray, out: np.ndarray, team: Team, *, name: str = "", first_row: int = 0
) -> None:
    """Write `values` as blocks of `type_` into `out`.

    values : [rows, columns], C-contiguous, float32, float16, or uint16 for the bits of bfloat16
    out : uint8, C-contiguous, of the size that the type gives;  name, first_row : for the error only
    raises FormatError naming the first element that is infinite, no number, or too large for the type
    """
    rows, columns = values.shape
    block, block_bytes = BLOCK[type_]
    assert values.flags.c_contiguous and out.flags.c_contiguous and out.dtype == np.uint8
    assert columns % block == 0 and out.size == rows * columns // block * block_bytes
    if not values.size:
        return
    status = np.zeros((team.n_threads, THREAD_BYTES // 8), np.int64)
    scratch = np.empty(team.n_threads * SCRATCH_BYTES + 64, np.uint8)
    operands = np.zeros(OPERANDS, np.int64)
    operands[SOURCE], operands[TARGET] = values.ctypes.data, out.ctypes.data
    operands[COLUMNS], operands[KIND] = columns, KIND_OF[values.dtype]
    operands[STATUS] = status.ctypes.data
    operands[SCRATCH] = -(-scratch.ctypes.data // 64) * 64
    program = np.zeros((1, FIELDS), np.int64)
    program[0] = quant(type_).quantize.address, operands.ctypes.data, rows, DYNAMIC, 1
    team.run(program, operands)
    if status.any() or _too_large_to_search(type_, values):
        raise FormatError(_unfit(type_, values, name, first_row))


def _too_large_to_search(type_: GGMLType, values: np.ndarray) -> bool:
    """The squares of such numbers would overflow in the search, and be taken for zeros. No half is so
    large.
    """
    searched = type_ in (GGMLType.Q4_K, GGMLType.Q6_K) and values.dtype != np.float16
    return searched and float(np.abs(as_floats(values)).max()) > MOST_SEARCHED


def as_floats(values: np.ndarray) -> np.ndarray:
    """float32 of float32, float16 or the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _unfit(type_: GGMLType, values: np.ndarray, name: str, first_row: int) -> str:
    for row, numbers in enumerate(values):
        floats = as_floats(numbers)
        if not np.isfinite(floats).all():
            column = int(np.flatnonzero(~np.isfinite(floats))[0])
            return (
                f"{name}: element [{first_row + row}, {column}] is {floats[column]}, expected a finite "
                "number; the weights are damaged, fetch them again"
            )
    magnitudes = [float(np.abs(as_floats(numbers)).max()) for numbers in values]
    row = int(np.argmax(magnitudes))
    return (
        f"{name}: row {first_row + row} has an element of {magnitudes[row]:.4g}, which is too large for "
        f"{type_.name}; convert to a type with a larger range (f32)"
    )


@exact
def finish(operands, thread, status):
    """Remember what was wrong with the rows that this thread did."""
    mine = i64_at(i64_at(operands)[STATUS] + THREAD_BYTES * thread)
    mine[0] = mine[0] | status


@exact
def status_of(most, half):
    """From the bits of a block's largest magnitude and of its scale as a half."""
    if most >= INFINITY_BITS:
        return NOT_FINITE
    return OVERFLOW if (half & 0x7FFF) == 0x7C00 else 0


@exact
def reciprocal(scale):
    """1 / scale; 0 where there is none (the scale is 0, or so small that a half holds 0 anyway)."""
    inverse = np.float32(1) / scale
    if abs(inverse) > np.float32(3.4e38):
        return np.float32(0)
    return inverse


@exact
def each_block(quantize_block, block_bytes, operands, span, thread):
    """quantize_block(a, b, target) -> status for all blocks of 32 of rows [span[0], span[1]).

    a, b : the 32 numbers as two vectors of float32
    """
    given = i64_at(operands)
    columns = given[COLUMNS]
    count = (span[1] - span[0]) * columns // 32
    target = given[TARGET] + span[0] * columns // 32 * block_bytes
    status = 0
    if given[KIND] == F32:
        source = given[SOURCE] + span[0] * columns * 4
        for k in range(count):
            at = source + 128 * k
            status |= quantize_block(load_f32x16(at), load_f32x16(at + 64), target + block_bytes * k)
    elif given[KIND] == F16:
        source = given[SOURCE] + span[0] * columns * 2
        for k in range(count):
            at = source + 64 * k
            status |= quantize_block(load_f16x16(at), load_f16x16(at + 32), target + block_bytes * k)
    else:
        source = given[SOURCE] + span[0] * columns * 2
        for k in range(count):
            at = source + 64 * k
            status |= quantize_block(load_bf16x16(at), load_bf16x16(at + 32), target + block_bytes * k)
    finish(operands, thread, status)


@exact
def each_number(write, shape, operands, span, thread):
    """write(address, k, float32) for number k of rows [span[0], span[1]) of a float type.

    shape : bytes of a number; bits of the largest magnitude that the type can round to
    """
    width, largest = shape
    given = i64_at(operands)
    start, count = span[0] * given[COLUMNS], (span[1] - span[0]) * given[COLUMNS]
    target, most = given[TARGET] + width * start, np.uint32(0)
    if given[KIND] == F32:
        numbers = f32_at(given[SOURCE] + 4 * start)
        for k in range(count):
            write(target, k, numbers[k])
            most = greater_u32(most, magnitude_of(numbers[k]))
    elif given[KIND] == F16:
        halves = u16_at(given[SOURCE] + 2 * start)
        for k in range(count):
            number = half_to_float(halves[k])
            write(target, k, number)
            most = greater_u32(most, magnitude_of(number))
    else:
        halves = u16_at(given[SOURCE] + 2 * start)
        for k in range(count):
            number = bfloat_to_float(halves[k])
            write(target, k, number)
            most = greater_u32(most, magnitude_of(number))
    finish(operands, thread, NOT_FINITE if most >= INFINITY_BITS else OVERFLOW if most > largest else 0)
