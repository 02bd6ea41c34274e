"""Q4_1: 32 elements in 20 bytes: half scale, half minimum, 16 bytes of nibbles; value = d q + m.

Source: ggml-quants.c, dequantize_row_q4_1.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U4M, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q4_1, U4M, 32, 20


@inline
def quad(block, i):
    return (load_u32(block + 4 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@inline
def minimum(block, g):
    return half_to_float(load_u16(block + 2))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (32, 20, 4, 32), operands, first, last)
