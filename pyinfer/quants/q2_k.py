"""Q2_K: 256 elements in 84 bytes: 16 x (4-bit scale, 4-bit minimum), 64 bytes of 2-bit codes, half d, half
dmin.

value = d s q - dmin m in groups of 16. Source: ggml-quants.c, dequantize_row_q2_K.
"""

from numpy import float32

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32, u8_at
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U4MG16, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q2_K, U4MG16, 256, 84


@inline
def two_bits(codes, i):
    """Elements 4 i .. 4 i + 3: each 32 bytes hold four runs of 32 elements, two bits apart."""
    return (load_u32(codes + 32 * (i // 32) + 4 * (i % 8)) >> (2 * (i % 32 // 8))) & 0x03030303


@inline
def quad(block, i):
    return two_bits(block + 16, i)


@inline
def scale(block, g):
    return half_to_float(load_u16(block + 80)) * float32(u8_at(block)[g] & 15)


@inline
def minimum(block, g):
    return -half_to_float(load_u16(block + 82)) * float32(u8_at(block)[g] >> 4)


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (256, 84, 4, 16), operands, first, last)
