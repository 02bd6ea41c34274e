"""Q5_1: 32 elements in 24 bytes: half scale, half minimum, 32 fifth bits, 16 bytes of nibbles; value = d q +
m.

Source: ggml-quants.c, dequantize_row_q5_1.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U8M, pack_codes
from pyinfer.quants.q5_0 import fifth_bits

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q5_1, U8M, 32, 24


@inline
def quad(block, i):
    low = (load_u32(block + 8 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F
    return low | fifth_bits(load_u32(block + 4), i)


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@inline
def minimum(block, g):
    return half_to_float(load_u16(block + 2))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (32, 24, 8, 32), operands, first, last)
